/* A libnvidia-ml.so.1 without a card: what it tells comes from the environment. Structures and values as in nvml.h.
 *
 * STUB_CARDS        number of cards
 * STUB_NAMES        "same" (default) or "differ"
 * STUB_MIG          index of a card in MIG mode with two instances
 * STUB_UNSUPPORTED  names of functions, separated by commas, that answer NOT_SUPPORTED
 * STUB_FORBIDDEN    the same for NO_PERMISSION
 * STUB_LOST         "card:calls": that card is lost after so many calls for its utilisation
 * STUB_OTHER        a process of another pid holds memory
 * STUB_THROTTLE     bits of the throttle reasons
 * STUB_INIT         error of nvmlInit
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, GPU_IS_LOST = 15 };
typedef struct device { int card; int instance; int calls; char uuid[64]; } *nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;
typedef struct { unsigned int pid; unsigned long long usedGpuMemory; unsigned int gpuInstanceId, computeInstanceId; } process_t;
typedef struct {
  unsigned int fieldId, scopeId;
  long long timestamp, latencyUsec;
  unsigned int valueType;
  nvmlReturn_t nvmlReturn;
  union { double dVal; unsigned int uiVal; unsigned long ulVal; unsigned long long ullVal; long long sllVal; } value;
} field_t;

static struct device cards[16], instances[16][2];

static int number(const char *name, int fallback) {
  const char *text = getenv(name);
  return text ? atoi(text) : fallback;
}

static int listed(const char *list, const char *name) {
  const char *text = getenv(list);
  size_t length = strlen(name);
  for (const char *at = text; at && (at = strstr(at, name)); at += length)
    if ((at == text || at[-1] == ',') && (at[length] == 0 || at[length] == ',')) return 1;
  return 0;
}

static nvmlReturn_t answer(nvmlDevice_t device, const char *name) {
  if (listed("STUB_UNSUPPORTED", name)) return NOT_SUPPORTED;
  if (listed("STUB_FORBIDDEN", name)) return NO_PERMISSION;
  int card, calls;
  const char *lost = getenv("STUB_LOST");
  if (lost && sscanf(lost, "%d:%d", &card, &calls) == 2 && device->card == card && cards[card].calls > calls)
    return GPU_IS_LOST;
  return SUCCESS;
}

#define ANSWER(device, name) do { nvmlReturn_t r = answer(device, name); if (r) return r; } while (0)

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
  for (int c = 0; c < 16; c++) {
    cards[c].card = c;
    cards[c].instance = -1;
    snprintf(cards[c].uuid, 64, "GPU-%d%d%d%d0000-0000-0000-0000-000000000000", c, c, c, c);
    for (int i = 0; i < 2; i++) {
      instances[c][i].card = c;
      instances[c][i].instance = i;
      snprintf(instances[c][i].uuid, 64, "MIG-%d%d000000-0000-0000-0000-000000000000", c, i);
    }
  }
  return number("STUB_INIT", SUCCESS);
}
nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(nvmlReturn_t r) { return r == NOT_SUPPORTED ? "Not Supported" : "An error"; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) { *count = number("STUB_CARDS", 1); return SUCCESS; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int i, nvmlDevice_t *d) {
  if ((int)i >= number("STUB_CARDS", 1)) return INVALID_ARGUMENT;
  *d = &cards[i];
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *d) {
  for (int c = 0; c < number("STUB_CARDS", 1); c++) {
    if (!strcmp(cards[c].uuid, uuid)) { *d = &cards[c]; return SUCCESS; }
    for (int i = 0; i < 2; i++)
      if (number("STUB_MIG", -1) == c && !strcmp(instances[c][i].uuid, uuid)) { *d = &instances[c][i]; return SUCCESS; }
  }
  return NOT_FOUND;
}
nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t d, unsigned int *is) { *is = d->instance >= 0; return SUCCESS; }
nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t d, nvmlDevice_t *card) {
  *card = &cards[d->card];
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t d, unsigned int *now, unsigned int *pending) {
  *now = *pending = number("STUB_MIG", -1) == d->card;
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t d, unsigned int *count) { *count = 2; return SUCCESS; }
nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t d, unsigned int i, nvmlDevice_t *mig) {
  *mig = &instances[d->card][i];
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t d, char *name, unsigned int length) {
  const char *names = getenv("STUB_NAMES");
  snprintf(name, length, "Stub %c", names && !strcmp(names, "differ") ? 'A' + d->card : 'A');
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t d, char *uuid, unsigned int length) {
  snprintf(uuid, length, "%s", d->uuid);
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t d, nvmlUtilization_t *rates) {
  cards[d->card].calls++;
  ANSWER(d, "utilization");
  if (d->instance >= 0) return NOT_SUPPORTED;
  rates->gpu = 40 + d->card;
  rates->memory = 20;
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t d, nvmlMemory_t *memory) {
  ANSWER(d, "memory");
  memory->total = d->instance >= 0 ? 4ull << 30 : 16ull << 30;
  memory->used = (1ull + d->card) << 30;
  memory->free = memory->total - memory->used;
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t d, unsigned int *count, process_t *found) {
  ANSWER(d, "processes");
  unsigned int all = 1 + (number("STUB_OTHER", 0) != 0), room = *count;
  *count = all;
  if (room < all) return 7; /* INSUFFICIENT_SIZE */
  memset(found, 0, all * sizeof *found);
  found[0].pid = getpid();
  found[0].usedGpuMemory = 512ull << 20;
  if (all > 1) { found[1].pid = 1; found[1].usedGpuMemory = 256ull << 20; }
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t d, unsigned int *mw) { ANSWER(d, "power"); *mw = 150000; return SUCCESS; }
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t d, unsigned int *mw) { *mw = 300000; return SUCCESS; }
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t d, int sensor, unsigned int *c) {
  ANSWER(d, "temperature");
  *c = 60 + d->card;
  return SUCCESS;
}
typedef struct { unsigned int version; int sensorType; int temperature; } temperature_t;
nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t d, temperature_t *t) {
  ANSWER(d, "temperature");
  t->temperature = 60 + d->card;
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t d, int clock, unsigned int *mhz) {
  *mhz = clock == 1 ? 1500 : 5000;
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t d, unsigned long long *reasons) {
  ANSWER(d, "throttle");
  *reasons = number("STUB_THROTTLE", 0);
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t d, int counter, unsigned int *kb) {
  ANSWER(d, "pcie");
  *kb = counter ? 2000 : 1000;
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t d, int count, field_t *values) {
  ANSWER(d, "nvlink");
  static unsigned long long total;
  for (int i = 0; i < count; i++) { values[i].nvmlReturn = SUCCESS; values[i].value.ullVal = total += 1024; }
  return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t d, int kind, int counter, unsigned long long *errors) {
  ANSWER(d, "ecc");
  *errors = kind == 0 ? 3 : 0;
  return SUCCESS;
}
