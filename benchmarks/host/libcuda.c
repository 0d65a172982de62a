// What Triton asks of libcuda.so.1, answered without a GPU: every call succeeds, and a launch is only counted.
#include <stddef.h>
#include <string.h>

typedef void *Handle;
unsigned long long launched = 0;
static int nothing;

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;       // warp size
    case 16: *value = 132; break;      // multiprocessors
    case 8: *value = 49152; break;     // shared memory of a block
    case 97: *value = 232448; break;   // ... if it is asked for
    case 81: *value = 233472; break;   // ... of a multiprocessor
    case 75: *value = 9; break;        // compute capability
    case 76: *value = 0; break;
    default: *value = 1024;
  }
  return 0;
}
int cuDevicePrimaryCtxRetain(Handle *context, int device) { *context = &nothing; return 0; }
int cuCtxGetCurrent(Handle *context) { *context = &nothing; return 0; }
int cuCtxSetCurrent(Handle context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(Handle *module, const void *image) { *module = &nothing; return 0; }
int cuModuleUnload(Handle module) { return 0; }
int cuModuleGetFunction(Handle *function, Handle module, const char *name) { *function = &nothing; return 0; }
int cuFuncGetAttribute(int *value, int attribute, Handle function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;  // threads of a block, registers of a thread
  return 0;
}
int cuFuncSetAttribute(Handle function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(Handle function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *count, Handle function, const void *config) { *count = 1; return 0; }
int cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return 0;
}
int cuTensorMapEncodeTiled(void *map, ...) { memset(map, 0, 128); return 0; }
int cuTensorMapEncodeIm2col(void *map, ...) { memset(map, 0, 128); return 0; }
int cuLaunchKernelEx(const void *config, Handle function, void **parameters, void **extra) {
  launched++;
  return 0;
}
