# Sets CUTLASS_DIR to a folder that holds include/cutlass: -DCUTLASS_DIR, the environment variable
# CUTLASS_DIR, or the package nvidia-cutlass of the building Python, in that order.
if(NOT CUTLASS_DIR)
  set(CUTLASS_DIR "$ENV{CUTLASS_DIR}")
endif()
if(NOT CUTLASS_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "from importlib.util import find_spec; \
print(find_spec('cutlass_library').submodule_search_locations[0] + '/source', end='')"
    OUTPUT_VARIABLE CUTLASS_DIR ERROR_QUIET)
endif()
if(NOT EXISTS "${CUTLASS_DIR}/include/cutlass/cutlass.h")
  message(FATAL_ERROR
    "CUTLASS was not found (CUTLASS_DIR is '${CUTLASS_DIR}'). The GEMM for sm_90a needs its headers: "
    "`pip install --no-deps nvidia-cutlass==4.2.0`, or set CUTLASS_DIR to a checkout of CUTLASS "
    "4.2, or leave 90a out of NSRU_CUDA_ARCHS.")
endif()
message(STATUS "nsru-kernels: CUTLASS in ${CUTLASS_DIR}")
