/* The ghost's cuBLAS, cuBLASLt and NCCL: every product and collective is counted and none is made. See runtime.c.

   No header of theirs is read here. Functions that only succeed need not name their arguments, and of the others this file
   declares what it looks at; a C caller passes the rest in registers and on the stack, where it does no harm. */

#include <stdint.h>
#include <string.h>

#include "ghost.h"

enum { SUCCESS = 0, CUBLAS_INVALID_VALUE = 7, NCCL_INVALID_ARGUMENT = 4 };

static void *handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__sync_add_and_fetch(&last, 64);
}

#define SUCCEEDS(name) int name() { return SUCCESS; }
#define CREATES(name) int name(void **made) { *made = handle(); return SUCCESS; }

static const void *blas_stream; /* torch names it before every product */

static int product(const char *name, const void *a, const void *b, const void *c) {
    int there = ghost_place(a) == DEVICE && ghost_place(b) == DEVICE && ghost_place(c) == DEVICE;
    ghost_note_on(blas_stream, there ? PRODUCT : REFUSAL, name, 0);
    return there ? SUCCESS : CUBLAS_INVALID_VALUE;
}

/* --- cuBLAS --- */

CREATES(cublasCreate_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS(cublasSetPointerMode_v2)

int cublasSetStream_v2(void *blas, const void *stream) {
    blas_stream = stream;
    return SUCCESS;
}

int cublasGetMathMode(void *blas, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *blas, int *mode) { return *mode = 0; }

int cublasGemmEx(void *blas, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type, int lda,
                 const void *b, int b_type, int ldb, const void *beta, void *c) {
    return product(__func__, a, b, c);
}

int cublasGemmStridedBatchedEx(void *blas, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type,
                               int lda, long long a_stride, const void *b, int b_type, int ldb, long long b_stride,
                               const void *beta, void *c) {
    return product(__func__, a, b, c);
}

int cublasSgemm_v2(void *blas, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda, const void *b,
                   int ldb, const void *beta, void *c) {
    return product(__func__, a, b, c);
}

int cublasSgemmEx(void *blas, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type, int lda,
                  const void *b, int b_type, int ldb, const void *beta, void *c) {
    return product(__func__, a, b, c);
}

int cublasSgemmStridedBatched(void *blas, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda,
                              long long a_stride, const void *b, int ldb, long long b_stride, const void *beta, void *c) {
    return product(__func__, a, b, c);
}

int cublasSgemv_v2(void *blas, int transposed, int m, int n, const void *alpha, const void *a, int lda, const void *x, int incx,
                   const void *beta, void *y) {
    return product(__func__, a, x, y);
}

int cublasSdot_v2(void *blas, int n, const void *x, int incx, const void *y) { return product(__func__, x, y, x); }
int cublasDotEx(void *blas, int n, const void *x, int x_type, int incx, const void *y) { return product(__func__, x, y, x); }

/* --- cuBLASLt --- */

CREATES(cublasLtCreate)
CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatmulPreferenceCreate)
CREATES(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasLtDestroy)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)

/* One algorithm, whatever is asked: cuBLASLt's own choice needs a GPU. 128 bytes are its struct of a result. */
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   char *results, int *found) {
    memset(results, 0, 128);
    *found = 1;
    return SUCCESS;
}

int cublasLtMatmul(void *lt, void *description, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const void *beta, const void *c, void *c_layout, void *d, void *d_layout, void *algorithm, void *workspace,
                   size_t workspace_bytes, const void *stream) {
    blas_stream = stream;
    return product(__func__, a, b, d);
}

/* --- NCCL: a call with a buffer that no GPU could read is refused; a message without elements has none --- */

static int usable(const void *buffer) { return !buffer || ghost_place(buffer) == DEVICE; }

static int exchange(const char *name, const void *sent, const void *received, const void *stream) {
    int there = usable(sent) && usable(received);
    ghost_note_on(stream, there ? COLLECTIVE : REFUSAL, name, 0);
    return there ? SUCCESS : NCCL_INVALID_ARGUMENT;
}

static int collective(const char *name, const void *sent, const void *received) { return exchange(name, sent, received, NULL); }

CREATES(ncclCommInitRank)
CREATES(ncclCommInitRankConfig)
CREATES(ncclCommInitRankScalable)
SUCCEEDS(ncclGroupStart)
SUCCEEDS(ncclGroupEnd)
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclCommAbort)
SUCCEEDS(ncclCommRegister)
SUCCEEDS(ncclCommDeregister)
SUCCEEDS(ncclRedOpDestroy)

int ncclCommSplit(void *comm, int color, int key, void **made, void *config) {
    *made = handle();
    return SUCCESS;
}

int ncclGetVersion(int *version) {
    *version = 22907;
    return SUCCESS;
}

int ncclGetUniqueId(char *id) {
    memset(id, 1, 128);
    return SUCCESS;
}

int ncclCommGetAsyncError(void *comm, int *error) { return *error = SUCCESS; }
int ncclCommUserRank(void *comm, int *rank) { return *rank = 0; }

int ncclCommCount(void *comm, int *count) {
    *count = 1;
    return SUCCESS;
}

int ncclCommMemStats(void *comm, int kind, uint64_t *bytes) {
    *bytes = 0;
    return SUCCESS;
}

int ncclRedOpCreatePreMulSum(int *made) {
    *made = 10;
    return SUCCESS;
}

const char *ncclGetErrorString(int error) { return error ? "refused by the ghost" : "no error"; }
const char *ncclGetLastError(void *comm) { return "refused by the ghost"; }

int ncclAllReduce(const void *sent, void *received, size_t count, int type, int operation, void *comm, const void *stream) {
    return exchange(__func__, sent, received, stream);
}

int ncclAllGather(const void *sent, void *received) { return collective(__func__, sent, received); }
int ncclReduceScatter(const void *sent, void *received) { return collective(__func__, sent, received); }
int ncclBroadcast(const void *sent, void *received) { return collective(__func__, sent, received); }
int ncclReduce(const void *sent, void *received) { return collective(__func__, sent, received); }
int ncclAlltoAll(const void *sent, void *received) { return collective(__func__, sent, received); }
int ncclBcast(void *buffer) { return collective(__func__, buffer, buffer); }

int ncclSend(const void *buffer, size_t count, int type, int peer, void *comm, const void *stream) {
    return exchange(__func__, buffer, buffer, stream);
}

int ncclRecv(void *buffer, size_t count, int type, int peer, void *comm, const void *stream) {
    return exchange(__func__, buffer, buffer, stream);
}
