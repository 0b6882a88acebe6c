# NORMD_CUDA, and where it is on the language CUDA: included by whoever is the project,
# since a language is for a whole tree. Sets NORMD_CUDA_FOUND.
include_guard(GLOBAL)

set(NORMD_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (when a CUDA compiler is found), ON or OFF")
set(NORMD_CUDA_FOUND OFF)
if(NORMD_CUDA STREQUAL "OFF")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  # Where the toolkit's installer puts it, without a change of PATH.
  find_program(NORMD_NVCC nvcc HINTS /usr/local/cuda/bin)
  if(NORMD_NVCC)
    set(CMAKE_CUDA_COMPILER ${NORMD_NVCC})
  elseif(NORMD_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA backend: no, there is no CUDA compiler")
    return()
  endif()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  # For CMake to try the compiler with; the rest once it is known.
  set(CMAKE_CUDA_ARCHITECTURES 80)
  set(choose_architectures ON)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(NORMD_CUDA_FOUND ON)

if(choose_architectures)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE supported)
  set(CMAKE_CUDA_ARCHITECTURES)
  foreach(architecture 75 80 86 89 90)
    if(supported MATCHES "compute_${architecture}(\n|$)")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture}-real)
      set(newest ${architecture})
    endif()
  endforeach()
  # PTX of the newest, for GPUs after it.
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
endif()
message(STATUS
  "CUDA backend: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
