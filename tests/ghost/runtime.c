/* A ghost H100: stands in for a GPU's driver and libraries, so that a CUDA build of torch runs on a machine without one.

   What it does. Preloaded into a process, it answers in the place of the CUDA runtime (this file), of the driver (driver.c)
   and of cuBLAS, cuBLASLt and NCCL (libraries.c) as one idle H100 of 80 GB would. All of torch above them is real: dispatch,
   checks of arguments, autograd, the caching allocator, streams and events, and Triton, which compiles its kernels in full.
   Device memory is memory of the host. Copies to and from the host are made, so that small facts (sizes, counts, seeds)
   arrive; kernels, products and collectives are only counted.

   What it counts. A log of events in the order of the calls: kernels by name, products, collectives, copies and fills with
   their bytes, every wait of the host, orders between streams, allocations. A pointer that a GPU could not read is refused
   with the error that the real library would give, and counted too. tests/ghost/log.py reads the log.

   What it cannot show. No value: what a kernel would have written is whatever lay there, mostly zeros. No time of a GPU. No
   choice that the libraries make by themselves (which algorithm of cuBLAS, whether cuDNN's attention takes a shape), no
   kernel's faults, no order of work on the GPU, no traffic between GPUs. Functions that are not written here go to the real
   libraries, which find no GPU and say so.

   This file: the runtime's functions that torch 2.11 to 2.13 call, CUDA 13. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ghost.h"

/* --- the log, read by tests/ghost/log.py --- */

struct ghost_event {
    int32_t kind;
    const char *name;
    uint64_t bytes;
    uint64_t stream;
};

#define CAPACITY (1 << 21)
struct ghost_event ghost_events[CAPACITY];
volatile int32_t ghost_count = 0; /* beyond CAPACITY the log is full and the reader says so */

void ghost_note_on(const void *stream, enum ghost_kind kind, const char *name, uint64_t bytes) {
    int32_t place = __sync_fetch_and_add(&ghost_count, 1);
    if (place < CAPACITY) ghost_events[place] = (struct ghost_event){kind, name, bytes, (uint64_t)stream};
}

void ghost_note(enum ghost_kind kind, const char *name, uint64_t bytes) { ghost_note_on(NULL, kind, name, bytes); }

/* --- memory --- */

#define BLOCKS 65536
static struct {
    char *start;
    size_t bytes;
    enum ghost_place place;
} blocks[BLOCKS];
static int block_count = 0;
static size_t used = 0;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

void ghost_add_memory(void *address, size_t bytes, enum ghost_place place) {
    pthread_mutex_lock(&guard);
    if (block_count == BLOCKS) {
        fprintf(stderr, "ghost: more than %d blocks of memory at a time\n", BLOCKS);
        abort();
    }
    blocks[block_count].start = address;
    blocks[block_count].bytes = bytes;
    blocks[block_count++].place = place;
    if (place == DEVICE) used += bytes;
    pthread_mutex_unlock(&guard);
}

size_t ghost_remove_memory(void *address) {
    size_t bytes = 0;
    pthread_mutex_lock(&guard);
    for (int i = 0; i < block_count && !bytes; i++)
        if (blocks[i].start == address) {
            bytes = blocks[i].bytes;
            if (blocks[i].place == DEVICE) used -= bytes;
            blocks[i] = blocks[--block_count];
        }
    pthread_mutex_unlock(&guard);
    return bytes;
}

enum ghost_place ghost_place(const void *address) {
    enum ghost_place place = NOWHERE;
    const char *byte = address;
    pthread_mutex_lock(&guard);
    for (int i = 0; i < block_count && place == NOWHERE; i++)
        if (byte >= blocks[i].start && byte < blocks[i].start + blocks[i].bytes) place = blocks[i].place;
    pthread_mutex_unlock(&guard);
    return place;
}

size_t ghost_free_bytes(void) { return GHOST_BYTES - used; }

void *ghost_take(size_t bytes) {
    void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return address == MAP_FAILED ? NULL : address;
}

cudaError_t cudaMalloc(void **address, size_t bytes) {
    if (bytes > ghost_free_bytes() || !(*address = ghost_take(bytes))) return cudaErrorMemoryAllocation;
    ghost_add_memory(*address, bytes, DEVICE);
    ghost_note(ALLOCATION, __func__, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *address) {
    size_t bytes = ghost_remove_memory(address);
    if (bytes) munmap(address, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    if (posix_memalign(address, 4096, bytes)) return cudaErrorMemoryAllocation;
    ghost_add_memory(*address, bytes, PINNED);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) {
    if (ghost_remove_memory(address)) free(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    ghost_add_memory(address, bytes, PINNED);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) {
    ghost_remove_memory(address);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeHost};
    enum ghost_place place = ghost_place(address);
    memset(found, 0, sizeof *found);
    found->type = types[place];
    found->device = place == DEVICE ? 0 : -1;
    found->devicePointer = place == NOWHERE ? NULL : (void *)address;
    found->hostPointer = place == PINNED ? (void *)address : NULL;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = GHOST_BYTES;
    *available = ghost_free_bytes();
    return cudaSuccess;
}

/* --- copies and fills --- */

/* What stays on the device is a matter of values, which mean nothing here; large blocks would only cost time. */
#define LARGEST_MADE (1 << 20)

static cudaError_t copy(void *to, const void *from, size_t bytes, const char *name) {
    int leaves = ghost_place(from) == DEVICE, arrives = ghost_place(to) == DEVICE;
    ghost_note(leaves && arrives ? ON_DEVICE : arrives ? TO_DEVICE : TO_HOST, name, bytes);
    if (!(leaves && arrives) || bytes <= LARGEST_MADE) memmove(to, from, bytes);
    return cudaSuccess;
}

static cudaError_t fill(void *address, int value, size_t bytes, const char *name) {
    ghost_note(FILL, name, bytes);
    if (bytes <= LARGEST_MADE) memset(address, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes, __func__);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    ghost_note(WAIT, __func__, 0);
    return copy(to, from, bytes, __func__);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes, __func__);
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
    ghost_note(TO_DEVICE, __func__, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *address, int value, size_t bytes) { return fill(address, value, bytes, __func__); }

cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    return fill(address, value, bytes, __func__);
}

/* --- the device --- */

int ghost_attribute(int attribute) {
    switch (attribute) { /* of an H100 SXM; the driver numbers them alike */
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrUnifiedAddressing: return 1;
    default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = ghost_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H100 80GB HBM3 (ghost)");
    found->totalGlobalMem = GHOST_BYTES;
    found->major = 9;
    found->warpSize = 32;
    found->multiProcessorCount = ghost_attribute(cudaDevAttrMultiProcessorCount);
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = ghost_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found->sharedMemPerMultiprocessor = ghost_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    found->l2CacheSize = ghost_attribute(cudaDevAttrL2CacheSize);
    found->memoryBusWidth = ghost_attribute(cudaDevAttrGlobalMemoryBusWidth);
    found->textureAlignment = 512;
    found->asyncEngineCount = 3;
    found->concurrentKernels = found->unifiedAddressing = 1;
    return cudaSuccess;
}

static cudaError_t set(int *where, int value) {
    *where = value;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { return set(count, 1); }
cudaError_t cudaGetDevice(int *device) { return set(device, 0); }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int here, int there) { return set(can, 0); }
cudaError_t cudaDriverGetVersion(int *version) { return set(version, CUDART_VERSION); }
cudaError_t cudaRuntimeGetVersion(int *version) { return set(version, CUDART_VERSION); }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:01:00.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *greatest = -5;
    return set(least, 0);
}

cudaError_t cudaDeviceSynchronize(void) {
    ghost_note(WAIT, __func__, 0);
    return cudaSuccess;
}

/* A function of the driver by its name. Those that are not written are not there, as with an older driver. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    char second[128];
    snprintf(second, sizeof second, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, second);
    if (!*function) *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* --- kernels: named as they are registered, counted as they are launched --- */

#define TABLE (1 << 19)
static struct {
    const void *function;
    const char *name;
} table[TABLE];

static int slot(const void *function) {
    int place = ((uintptr_t)function >> 4) * 2654435761u % TABLE;
    while (table[place].function && table[place].function != function) place = (place + 1) % TABLE;
    return place;
}

typedef void register_function(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *);

void __cudaRegisterFunction(void **binary, const char *function, char *device_function, const char *name, int limit,
                            void *thread, void *block, void *block_size, void *grid_size, int *warp_size) {
    static register_function *real = NULL;
    if (!real) real = (register_function *)dlsym(RTLD_NEXT, __func__);
    int place = slot(function);
    table[place].function = function;
    table[place].name = name;
    if (real) real(binary, function, device_function, name, limit, thread, block, block_size, grid_size, warp_size);
}

static cudaError_t launch(const void *function, cudaStream_t stream) {
    const char *name = table[slot(function)].name;
    ghost_note_on(stream, KERNEL, name ? name : "unnamed", 0);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(function, stream);
}

cudaError_t __cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(function, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch(function, config->stream);
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->ptxVersion = found->binaryVersion = 90;
    found->maxDynamicSharedSizeBytes = ghost_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_found, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    int fit = threads > 0 ? 2048 / threads : 2;
    return set(blocks_found, fit < 1 ? 1 : fit > 16 ? 16 : fit);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *found, const void *function, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(found, function, threads, shared, 0);
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char symbols[1 << 20];
    *address = symbols;
    return cudaSuccess;
}

/* --- streams and events: handles that differ, and nothing to wait for --- */

static void *handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__sync_add_and_fetch(&last, 16);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return set(priority, 0); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ghost_note(WAIT, __func__, 0);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    ghost_note_on(stream, ORDER, __func__, (uint64_t)event);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    if (id) *id = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = handle();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ghost_note_on(stream, ORDER, __func__, (uint64_t)event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ghost_note(WAIT, __func__, 0);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1.0f; /* no time passes here; a division by it must not fail */
    return cudaSuccess;
}
