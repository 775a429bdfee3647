/* In place of NVIDIA's driver, which a backward pass loads to ask whether a GPU has a context: none has. */
#define NONE(function) int function(void) { return 100; } /* CUDA_ERROR_NO_DEVICE */
NONE(cuCtxGetCurrent) NONE(cuCtxSetCurrent) NONE(cuDeviceGet) NONE(cuDeviceGetAttribute) NONE(cuDevicePrimaryCtxRetain)
NONE(cuFuncGetAttribute) NONE(cuFuncSetAttribute) NONE(cuFuncSetCacheConfig) NONE(cuGetErrorString)
NONE(cuLaunchCooperativeKernel) NONE(cuLaunchKernel) NONE(cuLinkAddData_v2) NONE(cuLinkComplete) NONE(cuLinkCreate_v2)
NONE(cuModuleGetFunction) NONE(cuModuleLoad) NONE(cuModuleLoadData) NONE(cuModuleLoadDataEx) NONE(cuModuleUnload)
NONE(cuOccupancyMaxActiveBlocksPerMultiprocessor) NONE(cuPointerGetAttribute) NONE(cuTensorMapEncodeTiled)

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = *active = 0; }
