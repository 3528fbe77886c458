/* The ghost's driver: what Triton's launcher and torch's allocator ask of libcuda.so.1. See runtime.c. */

/* cuda.h declares two functions with more arguments than matter here */
#define cuTensorMapEncodeTiled declared_cuTensorMapEncodeTiled
#define cuTensorMapEncodeIm2col declared_cuTensorMapEncodeIm2col
#include <cuda.h>
#undef cuTensorMapEncodeTiled
#undef cuTensorMapEncodeIm2col
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ghost.h"

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_SUCCESS ? "no error" : "refused by the ghost";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = ghost_attribute(attribute);
    return CUDA_SUCCESS;
}

/* One context, always current. */
static CUcontext context = (CUcontext)0x100;

CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext wanted) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) { return cuCtxGetCurrent(retained); }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}

/* --- modules and kernels: a kernel is its name --- */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)image;
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    ghost_note_on(config->hStream, KERNEL, (const char *)function, 0);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments, void **extra) {
    return cuLaunchKernelEx(&(CUlaunchConfig){.hStream = stream}, function, arguments, extra);
}

/* Triton's launcher asks this of every tensor; memory of the host that no driver knows is an error, as on a GPU. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (ghost_place((void *)address) == NOWHERE) {
        ghost_note(REFUSAL, __func__, 0);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
    else *(int *)value = 0;
    return CUDA_SUCCESS;
}

/* Descriptors of tensors for the copy engine: kernels that read them do not run. */
CUresult cuTensorMapEncodeTiled() { return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeIm2col() { return CUDA_SUCCESS; }

/* --- virtual memory, for the allocator's expandable segments --- */

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
    *address = (CUdeviceptr)ghost_take(bytes);
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    return munmap((void *)address, bytes) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *created, size_t bytes, const CUmemAllocationProp *kind, unsigned long long flags) {
    static unsigned long long last = 0;
    if (bytes > ghost_free_bytes()) return CUDA_ERROR_OUT_OF_MEMORY;
    *created = __sync_add_and_fetch(&last, 1);
    ghost_note(ALLOCATION, __func__, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle created) { return CUDA_SUCCESS; }

CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle created, unsigned long long flags) {
    ghost_add_memory((void *)address, bytes, DEVICE);
    return CUDA_SUCCESS;
}

/* Unmaps whole mappings, as the driver does. */
CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    for (size_t done = 0, part; done < bytes; done += part)
        if (!(part = ghost_remove_memory((void *)(address + done)))) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t count) { return CUDA_SUCCESS; }

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *kind, CUmemAllocationGranularity_flags option) {
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
}
