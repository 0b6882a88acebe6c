// Marks what runs in CUDA kernels as well as on the host.
#ifndef NORMD_KERNELS_HOST_DEVICE_H_
#define NORMD_KERNELS_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define NORMD_HOST_DEVICE __host__ __device__
#else
#define NORMD_HOST_DEVICE
#endif

#endif  // NORMD_KERNELS_HOST_DEVICE_H_
