// A mock of the NVIDIA driver's library, for tests on machines without a device.
//
// "Device memory" lies at addresses that nobody may read or write, so that a stray access of the processor ends the
// process; its bytes are in a shadow that only the copies here reach. Copies to and on the device are late: they happen
// when somebody waits for the context, or reads. A context must be current for every call that needs one.
//
// MOCK_CUDA_DEVICES: how many devices there are, 2 unless set. MOCK_CUDA_BYTES: what each has, 64 MiB unless set.
// MOCK_CUDA_FAIL: the function that fails with CUDA_ERROR_UNKNOWN. Built with -DTOO_OLD it lacks a function.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    UNKNOWN = 999,
};

#define DEVICES_MAX 8
#define ALLOCATIONS_MAX 64
#define PENDING_MAX 256
#define DEPTH_MAX 16

struct allocation {
    uintptr_t address;
    size_t len;
    unsigned char *shadow;
    int device;
};

struct registration {
    unsigned char *base;
    size_t len;
};

// A copy or a fill that has not happened yet.
struct pending {
    unsigned char *to;
    unsigned char *from;
    unsigned char *staged;
    unsigned char byte;
    size_t len;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int is_started;
static long retained[DEVICES_MAX];
static struct allocation allocations[ALLOCATIONS_MAX];
static struct registration registrations[ALLOCATIONS_MAX];
static struct pending queue[PENDING_MAX];
static int queued;
static _Thread_local int depth;
static _Thread_local int current[DEPTH_MAX];

static long setting(const char *name, long usual) {
    const char *text = getenv(name);
    return text ? atol(text) : usual;
}

static int fails(const char *function) {
    const char *name = getenv("MOCK_CUDA_FAIL");
    return name && strcmp(name, function) == 0;
}

#define FAIL_IF_TOLD() \
    if (fails(__func__)) return UNKNOWN
#define NEED_CONTEXT() \
    if (!is_started) return NOT_INITIALIZED; \
    if (depth == 0) return INVALID_CONTEXT

static struct allocation *find(uintptr_t address, size_t len) {
    for (int at = 0; at < ALLOCATIONS_MAX; at++) {
        struct allocation *one = &allocations[at];
        if (one->len && address >= one->address && address + len <= one->address + one->len) return one;
    }
    return NULL;
}

static unsigned char *shadow_of(uintptr_t address, size_t len) {
    struct allocation *found = find(address, len);
    return found ? found->shadow + (address - found->address) : NULL;
}

static void flush(void) {
    for (int at = 0; at < queued; at++) {
        struct pending *one = &queue[at];
        if (one->staged) {
            memcpy(one->to, one->staged, one->len);
            free(one->staged);
        } else if (one->from) {
            memcpy(one->to, one->from, one->len);
        } else {
            memset(one->to, one->byte, one->len);
        }
    }
    queued = 0;
}

static void put_off(struct pending one) {
    if (queued == PENDING_MAX) flush();
    queue[queued++] = one;
}

// === what tests look at ===

long mock_allocated_bytes(void) {
    long bytes = 0;
    for (int at = 0; at < ALLOCATIONS_MAX; at++) bytes += allocations[at].len;
    return bytes;
}

long mock_registered_bytes(void) {
    long bytes = 0;
    for (int at = 0; at < ALLOCATIONS_MAX; at++) bytes += registrations[at].len;
    return bytes;
}

long mock_contexts(void) {
    long contexts = 0;
    for (int at = 0; at < DEVICES_MAX; at++) contexts += retained[at];
    return contexts;
}

long mock_depth(void) { return depth; }

// The device that has these bytes; -1 where they are host memory.
int mock_device_of(uint64_t address, size_t len) {
    struct allocation *found = find(address, len);
    return found ? found->device : -1;
}

// What a network card does: reads and writes either kind of memory, without asking whether copies are late.
void mock_move(uint64_t to, uint64_t from, size_t len) {
    unsigned char *target = shadow_of(to, len), *source = shadow_of(from, len);
    memcpy(target ? target : (void *)(uintptr_t)to, source ? source : (void *)(uintptr_t)from, len);
}

// === the driver ===

int cuInit(unsigned flags) {
    (void)flags;
    FAIL_IF_TOLD();
    if (setting("MOCK_CUDA_DEVICES", 2) == 0) return NO_DEVICE;
    is_started = 1;
    return SUCCESS;
}

int cuGetErrorName(int code, const char **name) {
    switch (code) {
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; return SUCCESS;
    case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; return SUCCESS;
    case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return SUCCESS;
    case UNKNOWN: *name = "CUDA_ERROR_UNKNOWN"; return SUCCESS;
    default: *name = NULL; return INVALID_VALUE;
    }
}

int cuDeviceGet(int *device, int ordinal) {
    FAIL_IF_TOLD();
    if (!is_started) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= setting("MOCK_CUDA_DEVICES", 2)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    FAIL_IF_TOLD();
    pthread_mutex_lock(&lock);
    retained[device]++;
    pthread_mutex_unlock(&lock);
    *context = &retained[device];
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    pthread_mutex_lock(&lock);
    retained[device]--;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int cuCtxPushCurrent_v2(void *context) {
    FAIL_IF_TOLD();
    if (depth == DEPTH_MAX || *(long *)context < 1) return INVALID_CONTEXT;
    current[depth++] = (int)((long *)context - retained);
    return SUCCESS;
}

int cuCtxPopCurrent_v2(void **context) {
    if (depth == 0) return INVALID_CONTEXT;
    *context = &retained[current[--depth]];
    return SUCCESS;
}

int cuCtxSynchronize(void) {
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    flush();
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int cuMemAlloc_v2(uint64_t *address, size_t len) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    int device = current[depth - 1], code = OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    long taken = 0;
    struct allocation *unused = NULL;
    for (int at = 0; at < ALLOCATIONS_MAX; at++) {
        struct allocation *one = &allocations[at];
        if (!one->len) unused = one;
        else if (one->device == device) taken += one->len;
    }
    if (unused && taken + (long)len <= setting("MOCK_CUDA_BYTES", 64 << 20)) {
        void *reserved = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        unsigned char *shadow = malloc(len);
        memset(shadow, 0xdd, len);
        *unused = (struct allocation){(uintptr_t)reserved, len, shadow, device};
        *address = (uintptr_t)reserved;
        code = SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

#ifndef TOO_OLD
int cuMemFree_v2(uint64_t address) {
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    flush();
    struct allocation *found = find(address, 1);
    int code = found && found->address == address ? SUCCESS : INVALID_VALUE;
    if (code == SUCCESS) {
        munmap((void *)found->address, found->len);
        free(found->shadow);
        *found = (struct allocation){0};
    }
    pthread_mutex_unlock(&lock);
    return code;
}
#endif

int cuMemsetD8_v2(uint64_t address, unsigned char byte, size_t len) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    unsigned char *to = shadow_of(address, len);
    if (to) put_off((struct pending){.to = to, .byte = byte, .len = len});
    pthread_mutex_unlock(&lock);
    return to ? SUCCESS : INVALID_VALUE;
}

int cuMemcpyHtoD_v2(uint64_t address, const void *from, size_t len) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    unsigned char *to = shadow_of(address, len);
    if (to) {
        unsigned char *staged = malloc(len);
        memcpy(staged, from, len);
        put_off((struct pending){.to = to, .staged = staged, .len = len});
    }
    pthread_mutex_unlock(&lock);
    return to ? SUCCESS : INVALID_VALUE;
}

int cuMemcpyDtoH_v2(void *to, uint64_t address, size_t len) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    flush();
    unsigned char *from = shadow_of(address, len);
    if (from) memcpy(to, from, len);
    pthread_mutex_unlock(&lock);
    return from ? SUCCESS : INVALID_VALUE;
}

int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t len) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    unsigned char *target = shadow_of(to, len), *source = shadow_of(from, len);
    int is_known = target && source;
    if (is_known) put_off((struct pending){.to = target, .from = source, .len = len});
    pthread_mutex_unlock(&lock);
    return is_known ? SUCCESS : INVALID_VALUE;
}

int cuMemHostRegister_v2(void *base, size_t len, unsigned flags) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    int code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int at = 0; at < ALLOCATIONS_MAX && flags == 1; at++) {
        if (registrations[at].len) continue;
        registrations[at] = (struct registration){base, len};
        code = SUCCESS;
        break;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int cuMemHostUnregister(void *base) {
    FAIL_IF_TOLD();
    NEED_CONTEXT();
    int code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int at = 0; at < ALLOCATIONS_MAX; at++) {
        struct registration *one = &registrations[at];
        if (!one->len || one->base != base) continue;
        // Memory that was unmapped before it is taken back ends the process here.
        volatile unsigned char *bytes = one->base;
        (void)bytes[0];
        (void)bytes[one->len - 1];
        *one = (struct registration){0};
        code = SUCCESS;
        break;
    }
    pthread_mutex_unlock(&lock);
    return code;
}
