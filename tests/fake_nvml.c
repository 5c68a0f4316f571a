/* A stand-in for libnvidia-ml.so.1, scripted by environment variables.
 *
 * NVML_COUNT GPUs; every answer is NVML_<device>_<FIELD>, or NVML_<FIELD> for all devices, or a default. A device is
 * its index, and a MIG instance <index>M<instance> (NVML_0_MIG=2 makes two). An answer may be a list "a,b,c": one per
 * call, the last for ever. "!15" is an error code instead of a value.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int R;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } Process;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { char legacy[16]; unsigned int domain, bus, device, id, subsystem; char bus_id[32]; } Pci;

static struct { char name[64]; int calls; } counters[512];

static int calls(const char *name) {
    for (int i = 0; i < 512; i++) {
        if (!counters[i].name[0]) strncpy(counters[i].name, name, 63);
        if (!strcmp(counters[i].name, name)) return counters[i].calls++;
    }
    return 0;
}

/* The scripted text of a field, the one for this call of a list. */
static int lookup(long device, const char *field, const char *otherwise, char *text) {
    char name[64];
    const char *found = NULL;
    if (device >= 100) snprintf(name, 64, "NVML_%ldM%ld_%s", device / 100 - 1, device % 100, field);
    else if (device > 0) snprintf(name, 64, "NVML_%ld_%s", device - 1, field);
    if (device > 0) found = getenv(name);
    if (!found) { snprintf(name, 64, "NVML_%s", field); found = getenv(name); }
    if (!found) found = otherwise;
    else for (int skip = calls(name); skip > 0 && strchr(found, ','); skip--) found = strchr(found, ',') + 1;
    snprintf(text, 96, "%s", found);
    if (strchr(text, ',')) *strchr(text, ',') = 0;
    return text[0] == '!' ? atoi(text + 1) : 0;
}

static R number(long device, const char *field, const char *otherwise, unsigned long long *value) {
    char text[96];
    R code = lookup(device, field, otherwise, text);
    if (!code) *value = strtoull(text, NULL, 10);
    return code;
}

static R small(long device, const char *field, const char *otherwise, unsigned int *value) {
    unsigned long long wide = 0;
    R code = number(device, field, otherwise, &wide);
    if (!code) *value = (unsigned int)wide;
    return code;
}

R nvmlInitWithFlags(unsigned int flags) { unsigned long long n; (void)flags; return number(0, "INIT", "0", &n); }
R nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
R nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(R code) {
    return code == 3 ? "Not Supported" : code == 6 ? "Not Found" : code == 15 ? "GPU is lost" : "Error";
}
R nvmlSystemGetDriverVersion(char *text, unsigned int n) { (void)n; return lookup(0, "DRIVER", "580.65.06", text); }
R nvmlSystemGetCudaDriverVersion_v2(int *v) { return small(0, "CUDA", "13000", (unsigned int *)v); }
R nvmlDeviceGetCount_v2(unsigned int *count) { return small(0, "COUNT", "1", count); }

R nvmlDeviceGetHandleByIndex_v2(unsigned int index, long *device) {
    unsigned long long there;
    *device = index + 1;
    return number(*device, "HANDLE", "0", &there);
}
R nvmlDeviceGetMigMode(long device, unsigned int *current, unsigned int *pending) {
    R code = small(device, "MIG", "0", current);
    *current = *pending = *current > 0;
    return code;
}
R nvmlDeviceGetMaxMigDeviceCount(long device, unsigned int *count) { return small(device, "MIG", "0", count); }
R nvmlDeviceGetMigDeviceHandleByIndex(long device, unsigned int index, long *part) {
    *part = device * 100 + index;
    unsigned int made = 0;
    R code = small(device, "MIG", "0", &made);
    return code ? code : index < made ? 0 : 6;
}
R nvmlDeviceGetGpuInstanceId(long device, unsigned int *id) { *id = device % 100 + 1; return 0; }
R nvmlDeviceGetComputeInstanceId(long device, unsigned int *id) { (void)device; *id = 0; return 0; }

R nvmlDeviceGetUUID(long device, char *uuid, unsigned int n) {
    char otherwise[32];
    if (device >= 100) snprintf(otherwise, 32, "MIG-%ld%ld", device / 100 - 1, device % 100);
    else snprintf(otherwise, 32, "GPU-%c%c%c%c", (char)('a' + device - 1), (char)('a' + device - 1), (char)('a' + device - 1), (char)('a' + device - 1));
    (void)n;
    return lookup(device, "UUID", otherwise, uuid);
}
R nvmlDeviceGetName(long device, char *name, unsigned int n) {
    (void)n;
    return lookup(device, "NAME", "NVIDIA A100-SXM4-80GB", name);
}
R nvmlDeviceGetMemoryInfo(long device, Memory *memory) {
    R code = number(device, "TOTAL", "85899345920", &memory->total);
    if (!code) code = number(device, "USED", "3000000000", &memory->used);
    memory->free = memory->total - memory->used;
    return code;
}
R nvmlDeviceGetComputeRunningProcesses_v3(long device, unsigned int *count, Process *found) {
    unsigned long long bytes = 0, pid = 0;
    if (!found) { *count = 1; return 7; }
    R code = number(device, "PROCESS", "1234567168", &bytes);
    if (!code) code = number(device, "PID", "0", &pid);
    if (code) return code;
    *count = pid ? 1 : 0;
    found[0].pid = (unsigned int)pid;
    found[0].used = bytes ? bytes : ~0ULL;
    found[0].gi = found[0].ci = 0xFFFFFFFFu;
    return 0;
}
R nvmlDeviceGetComputeRunningProcesses_v2(long d, unsigned int *c, Process *f) { return nvmlDeviceGetComputeRunningProcesses_v3(d, c, f); }
R nvmlDeviceGetUtilizationRates(long device, Utilization *rates) { rates->memory = 0; return small(device, "UTILISATION", "97", &rates->gpu); }
R nvmlDeviceGetPowerUsage(long device, unsigned int *milliwatts) { return small(device, "POWER", "250000", milliwatts); }
R nvmlDeviceGetPowerManagementLimit(long device, unsigned int *milliwatts) { return small(device, "POWER_LIMIT", "400000", milliwatts); }
R nvmlDeviceGetTotalEnergyConsumption(long device, unsigned long long *millijoules) { return number(device, "ENERGY", "1000000", millijoules); }
R nvmlDeviceGetClockInfo(long device, int type, unsigned int *mhz) { return small(device, type == 2 ? "MEMORY_CLOCK" : "CLOCK", "1410", mhz); }
R nvmlDeviceGetTemperature(long device, int sensor, unsigned int *celsius) { (void)sensor; return small(device, "TEMPERATURE", "60", celsius); }
R nvmlDeviceGetCurrentClocksEventReasons(long device, unsigned long long *bits) { return number(device, "THROTTLES", "1", bits); }
R nvmlDeviceGetVirtualizationMode(long device, unsigned int *mode) { return small(device, "VIRTUAL", "0", mode); }
R nvmlDeviceGetCudaComputeCapability(long device, int *major, int *minor) {
    unsigned int both = 0;
    R code = small(device, "CAPABILITY", "80", &both);
    *major = (int)both / 10;
    *minor = (int)both % 10;
    return code;
}
R nvmlDeviceGetPciInfo_v3(long device, Pci *info) { memset(info, 0, sizeof *info); return lookup(device, "BUS", "00000000:07:00.0", info->bus_id); }
