/* A stand-in for libnvidia-ml.so.1: the entry points effprof uses, scripted by environment variables. */
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef void *nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int pid; unsigned long long usedGpuMemory; unsigned int gi, ci; } nvmlProcessInfo_t;

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) { (void)flags; return number("FAKE_INIT", 0); }
nvmlReturn_t nvmlInit_v2(void) { return number("FAKE_INIT", 0); }
nvmlReturn_t nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(nvmlReturn_t code) { return code == 3 ? "Not Supported" : code == 15 ? "GPU is lost" : "Error"; }

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) { *count = number("FAKE_COUNT", 1); return 0; }

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    if (number("FAKE_LOST", -1) == (int)index) return 15;
    *device = (nvmlDevice_t)(long)(index + 1);
    return 0;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    const char *names[] = {"GPU-aaaa", "GPU-bbbb", "GPU-cccc"};
    strncpy(uuid, names[(long)device - 1], length);
    return 0;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    (void)device;
    strncpy(name, "NVIDIA A100-SXM4-80GB", length);
    return 0;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    (void)device;
    memory->total = 85899345920ULL;
    memory->used = 3000000000ULL;
    memory->free = memory->total - memory->used;
    return number("FAKE_MEMORY", 0);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *found) {
    (void)device;
    int code = number("FAKE_PROCESSES", 0);
    if (code) return code;
    if (*count < 1 || !found) { *count = 1; return 7; }
    *count = 1;
    found[0].pid = number("FAKE_PID", 0);
    found[0].usedGpuMemory = number("FAKE_NO_USED", 0) ? ~0ULL : 1234567168ULL;
    found[0].gi = found[0].ci = 0xFFFFFFFFu;
    return 0;
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t d, unsigned int *c, nvmlProcessInfo_t *f) { return nvmlDeviceGetComputeRunningProcesses_v3(d, c, f); }

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) { strncpy(version, "580.65.06", length); return 0; }
