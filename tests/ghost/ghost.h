/* What the parts of the ghost share: the log, and which memory the ghost has given out. See runtime.c. */
#include <stddef.h>
#include <stdint.h>

enum ghost_kind {
    KERNEL = 1,  /* a kernel of torch, or one that Triton compiled */
    PRODUCT,     /* a call of cuBLAS or cuBLASLt */
    COLLECTIVE,  /* a call of NCCL */
    TO_DEVICE,   /* copies, with their bytes */
    TO_HOST,
    ON_DEVICE,
    FILL,        /* memset, with its bytes */
    WAIT,        /* the host waits for a stream, an event or the device */
    ORDER,       /* an event recorded, or a stream told to wait for one; the host goes on */
    ALLOCATION,  /* device memory asked of the driver, with its bytes */
    REFUSAL,     /* a call with a pointer that the device could not use; the call returns an error */
};

/* Append to the log. name: of the function or the kernel, never freed. stream: of kernels, products, messages of NCCL and orders,
   which have the event's handle for bytes. */
void ghost_note_on(const void *stream, enum ghost_kind kind, const char *name, uint64_t bytes);
void ghost_note(enum ghost_kind kind, const char *name, uint64_t bytes);

enum ghost_place { NOWHERE, DEVICE, PINNED };

/* Which memory an address lies in; NOWHERE is any that the ghost has not given out, such as pageable memory of the host. */
enum ghost_place ghost_place(const void *address);
void ghost_add_memory(void *address, size_t bytes, enum ghost_place place);
/* Bytes of the block that starts there, which is then forgotten; 0 where none does. */
size_t ghost_remove_memory(void *address);

/* Anonymous memory of the host in the place of the device's; untouched pages cost nothing. NULL beyond the device's size. */
void *ghost_take(size_t bytes);
size_t ghost_free_bytes(void);
int ghost_attribute(int attribute);

#define GHOST_BYTES (80ull << 30)
