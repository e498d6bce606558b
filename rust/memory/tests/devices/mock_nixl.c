// A mock of NIXL's C interface over the mock driver, both ends in one process. It moves bytes at once, and refuses
// lists that do not say rightly which memory lies on which device.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID = -2, NOT_FOUND = -3, DRAM = 0, VRAM = 1 };
#define DESCS_MAX 64
#define NOTES_MAX 256

typedef void *handle;

struct desc {
    uintptr_t address;
    size_t len;
    uint64_t device;
};

struct list {
    int kind;
    int count;
    struct desc descs[DESCS_MAX];
};

struct options {
    char message[256];
    size_t len;
    bool has_message;
};

struct note {
    char to[64], from[64], payload[256];
    size_t len;
};

struct notes {
    int count;
    struct note all[NOTES_MAX];
};

struct agent {
    char name[64];
};

struct request {
    struct options options;
    char peer[64];
    struct list from, to;
};

static struct notes waiting;
static int (*device_of)(uint64_t, size_t);
static void (*move)(uint64_t, uint64_t, size_t);

bool nixl_capi_is_stub(void) { return false; }

int nixl_capi_create_configured_agent(const char *name, const void *config, handle *out) {
    (void)config;
    void *driver = dlopen(getenv("ORCHESTRA_CUDA_LIB"), RTLD_NOW);
    device_of = (int (*)(uint64_t, size_t))dlsym(driver, "mock_device_of");
    move = (void (*)(uint64_t, uint64_t, size_t))dlsym(driver, "mock_move");
    struct agent *agent = calloc(1, sizeof *agent);
    strncpy(agent->name, name, sizeof agent->name - 1);
    *out = agent;
    return SUCCESS;
}

static int give(handle *out, size_t size) {
    *out = calloc(1, size);
    return SUCCESS;
}

static int take(handle made) {
    free(made);
    return SUCCESS;
}

int nixl_capi_destroy_agent(handle agent) { return take(agent); }
int nixl_capi_get_plugin_params(handle agent, const char *name, handle *memories, handle *parameters) {
    (void)agent, (void)name;
    give(memories, 1);
    return give(parameters, 1);
}
int nixl_capi_destroy_mem_list(handle list) { return take(list); }
int nixl_capi_destroy_params(handle parameters) { return take(parameters); }
int nixl_capi_create_backend(handle agent, const char *name, handle parameters, handle *out) {
    (void)agent, (void)name, (void)parameters;
    return give(out, 1);
}
int nixl_capi_destroy_backend(handle backend) { return take(backend); }

// === lists ===

static int create_list(int kind, handle *out) {
    struct list *list = calloc(1, sizeof *list);
    list->kind = kind;
    *out = list;
    return SUCCESS;
}

static int add(handle list, uintptr_t address, size_t len, uint64_t device) {
    struct list *to = list;
    if (to->count == DESCS_MAX) return INVALID;
    to->descs[to->count++] = (struct desc){address, len, device};
    return SUCCESS;
}

static int check(const struct list *list) {
    for (int at = 0; at < list->count; at++) {
        const struct desc *desc = &list->descs[at];
        int device = device_of(desc->address, desc->len);
        bool is_right = device < 0 ? list->kind == DRAM && desc->device == 0
                                   : list->kind == VRAM && desc->device == (uint64_t)device;
        if (!is_right) return INVALID;
    }
    return list->count ? SUCCESS : INVALID;
}

int nixl_capi_create_reg_dlist(int kind, handle *out) { return create_list(kind, out); }
int nixl_capi_reg_dlist_add_desc(handle list, uintptr_t address, size_t len, uint64_t device, const void *extra,
                                 size_t extra_len) {
    (void)extra, (void)extra_len;
    return add(list, address, len, device);
}
int nixl_capi_destroy_reg_dlist(handle list) { return take(list); }
int nixl_capi_register_mem(handle agent, handle list, handle options) {
    (void)agent, (void)options;
    return check(list);
}
int nixl_capi_deregister_mem(handle agent, handle list, handle options) {
    return nixl_capi_register_mem(agent, list, options);
}
int nixl_capi_create_xfer_dlist(int kind, handle *out) { return create_list(kind, out); }
int nixl_capi_xfer_dlist_add_desc(handle list, uintptr_t address, size_t len, uint64_t device) {
    return add(list, address, len, device);
}
int nixl_capi_destroy_xfer_dlist(handle list) { return take(list); }

// === peers ===

int nixl_capi_get_local_md(handle agent, void **data, size_t *len) {
    *data = strdup(((struct agent *)agent)->name);
    *len = strlen(*data);
    return SUCCESS;
}
int nixl_capi_load_remote_md(handle agent, const void *data, size_t len, char **name) {
    (void)agent;
    *name = strndup(data, len);
    return SUCCESS;
}
int nixl_capi_invalidate_remote_md(handle agent, const char *name) {
    (void)agent, (void)name;
    return SUCCESS;
}

// === transfers ===

int nixl_capi_create_opt_args(handle *out) { return give(out, sizeof(struct options)); }
int nixl_capi_opt_args_set_notif_msg(handle options, const void *data, size_t len) {
    struct options *to = options;
    if (len > sizeof to->message) return INVALID;
    memcpy(to->message, data, len);
    to->len = len;
    return SUCCESS;
}
int nixl_capi_opt_args_set_has_notif(handle options, bool has_message) {
    ((struct options *)options)->has_message = has_message;
    return SUCCESS;
}
int nixl_capi_destroy_opt_args(handle options) { return take(options); }

int nixl_capi_gen_notif(handle agent, const char *peer, const void *data, size_t len, handle options) {
    (void)options;
    if (waiting.count == NOTES_MAX || len > sizeof waiting.all->payload) return INVALID;
    struct note *note = &waiting.all[waiting.count++];
    *note = (struct note){.len = len};
    strncpy(note->to, peer, sizeof note->to - 1);
    strncpy(note->from, ((struct agent *)agent)->name, sizeof note->from - 1);
    memcpy(note->payload, data, len);
    return SUCCESS;
}

int nixl_capi_create_xfer_req(handle agent, int operation, handle ours, handle theirs, const char *peer, handle *out,
                              handle options) {
    (void)agent;
    const struct list *local = ours, *remote = theirs;
    if (local->count != remote->count || check(local) || check(remote)) return INVALID;
    struct request *request = calloc(1, sizeof *request);
    request->options = *(struct options *)options;
    request->from = operation == 1 ? *local : *remote;
    request->to = operation == 1 ? *remote : *local;
    strncpy(request->peer, peer, sizeof request->peer - 1);
    *out = request;
    return SUCCESS;
}
int nixl_capi_post_xfer_req(handle agent, handle request, handle options) {
    (void)options;
    struct request *posted = request;
    for (int at = 0; at < posted->from.count; at++)
        move(posted->to.descs[at].address, posted->from.descs[at].address, posted->from.descs[at].len);
    if (!posted->options.has_message) return SUCCESS;
    return nixl_capi_gen_notif(agent, posted->peer, posted->options.message, posted->options.len, NULL);
}
int nixl_capi_get_xfer_status(handle agent, handle request) {
    (void)agent, (void)request;
    return SUCCESS;
}
int nixl_capi_release_xfer_req(handle agent, handle request) {
    (void)agent, (void)request;
    return SUCCESS;
}
int nixl_capi_destroy_xfer_req(handle request) { return take(request); }

// === notifications: a map in which each one has an entry of its own ===

int nixl_capi_create_notif_map(handle *out) { return give(out, sizeof(struct notes)); }
int nixl_capi_destroy_notif_map(handle map) { return take(map); }
int nixl_capi_get_notifs(handle agent, handle map, handle options) {
    (void)options;
    struct notes *arrived = map;
    int kept = 0;
    for (int at = 0; at < waiting.count; at++) {
        bool is_ours = strcmp(waiting.all[at].to, ((struct agent *)agent)->name) == 0;
        if (is_ours) arrived->all[arrived->count++] = waiting.all[at];
        else waiting.all[kept++] = waiting.all[at];
    }
    waiting.count = kept;
    return SUCCESS;
}
int nixl_capi_notif_map_size(handle map, size_t *senders) {
    *senders = ((struct notes *)map)->count;
    return SUCCESS;
}
int nixl_capi_notif_map_get_agent_at(handle map, size_t at, const char **name) {
    *name = ((struct notes *)map)->all[at].from;
    return SUCCESS;
}
// By the address of the name, which tells entries of one sender apart.
static struct note *entry(const char *name) {
    return (struct note *)(name - offsetof(struct note, from));
}
int nixl_capi_notif_map_get_notifs_size(handle map, const char *name, size_t *count) {
    (void)map, (void)name;
    *count = 1;
    return SUCCESS;
}
int nixl_capi_notif_map_get_notif(handle map, const char *name, size_t at, const void **data, size_t *len) {
    (void)map;
    if (at != 0) return NOT_FOUND;
    *data = entry(name)->payload;
    *len = entry(name)->len;
    return SUCCESS;
}
