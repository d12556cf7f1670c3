# The CUDA extension, built when nvcc is found (PATH, CUDA_HOME, NVIDIA's pip packages) or asked for:
# JAX_FLASHATTN_CUDA=auto|on|off. nvcc is called directly: CMake's CUDA language does not accept the
# layout of the pip packages.

set(CUDA_CHOICE "$ENV{JAX_FLASHATTN_CUDA}")
if(CUDA_CHOICE STREQUAL "")
  set(CUDA_CHOICE auto)
endif()
string(TOLOWER "${CUDA_CHOICE}" CUDA_CHOICE)
if(NOT CUDA_CHOICE MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "JAX_FLASHATTN_CUDA must be auto, on or off, got ${CUDA_CHOICE}")
endif()
if(CUDA_CHOICE STREQUAL "off")
  message(STATUS "jax_flashattn: CUDA extension off (JAX_FLASHATTN_CUDA=off)")
  return()
endif()

execute_process(
  COMMAND
    "${Python_EXECUTABLE}" -c
    "import importlib.util as u; s = u.find_spec('nvidia'); \
print(';'.join(p + '/cu13/bin' for p in s.submodule_search_locations) if s else '')"
  OUTPUT_VARIABLE PIP_CUDA_BINS OUTPUT_STRIP_TRAILING_WHITESPACE)
find_program(NVCC nvcc PATHS ENV PATH "$ENV{CUDA_HOME}/bin" ${PIP_CUDA_BINS} NO_DEFAULT_PATH)
if(NOT NVCC)
  if(CUDA_CHOICE STREQUAL "on")
    message(FATAL_ERROR "JAX_FLASHATTN_CUDA=on, but no nvcc in PATH, CUDA_HOME or pip packages")
  endif()
  message(STATUS "jax_flashattn: no nvcc found, building without the CUDA extension")
  return()
endif()

# nvcc may be a link or a wrapper script; it knows where its toolkit is.
execute_process(COMMAND "${NVCC}" --dryrun -x cu -c /dev/null ERROR_VARIABLE NVCC_DRYRUN)
string(REGEX MATCH "TOP=([^\n]+)" _ "${NVCC_DRYRUN}")
file(REAL_PATH "${CMAKE_MATCH_1}" CUDA_ROOT)
find_library(CUDART_STATIC cudart_static
             PATHS "${CUDA_ROOT}/lib64" "${CUDA_ROOT}/lib" "${CUDA_ROOT}/targets/x86_64-linux/lib"
                   "${CUDA_ROOT}/targets/sbsa-linux/lib"
             NO_DEFAULT_PATH REQUIRED)
find_path(CUDA_INCLUDE cuda_runtime_api.h
          PATHS "${CUDA_ROOT}/include" "${CUDA_ROOT}/targets/x86_64-linux/include"
                "${CUDA_ROOT}/targets/sbsa-linux/include"
          NO_DEFAULT_PATH REQUIRED)
message(STATUS "jax_flashattn: CUDA extension with ${NVCC}")

set(NVCC_FLAGS -std=c++17 -O3 -DNDEBUG -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
               -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v)

set(GENERATED "${CMAKE_CURRENT_BINARY_DIR}/generated")
add_custom_command(
  OUTPUT "${GENERATED}/ptx/wgmma_shapes.h"
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/build_support/generate_wgmma.py"
          "${GENERATED}/ptx/wgmma_shapes.h"
  DEPENDS build_support/generate_wgmma.py
  VERBATIM)

# cuda_object(<name> <source> SPILLS <bytes> FLAGS <flags...>) compiles one source into CUDA_OBJECTS.
# The log beside the object keeps ptxas's report of registers and spills.
function(cuda_object name source)
  cmake_parse_arguments(PARSE_ARGV 2 ARG "" "SPILLS" "FLAGS")
  set(object "${CMAKE_CURRENT_BINARY_DIR}/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/build_support/run_nvcc.py"
            "${object}.log" "${ARG_SPILLS}" "${NVCC}" ${NVCC_FLAGS} -I${GENERATED} ${ARG_FLAGS} -MD
            -MF "${object}.d" -c "${CMAKE_CURRENT_SOURCE_DIR}/${source}" -o "${object}"
    DEPENDS "${source}" build_support/run_nvcc.py "${GENERATED}/ptx/wgmma_shapes.h"
    DEPFILE "${object}.d"
    VERBATIM)
  set(CUDA_OBJECTS ${CUDA_OBJECTS} "${object}" PARENT_SCOPE)
endfunction()

# Machine code for Ampere and PTX for everything after it.
cuda_object(plain csrc/cuda/plain/attention.cu SPILLS 0
            FLAGS -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80)

cuda_object(append csrc/cuda/append.cu SPILLS 0
            FLAGS -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80)

# Hopper. What may spill, in bytes: the warps that feed the copy engine or make dropout's flags, which
# have 24 to 56 registers and run ahead of the rest; of consumers (most at head dim 192), single
# numbers that are read once a block or tile.
set(HOPPER -gencode=arch=compute_90a,code=sm_90a)
set(HEAD_DIMS 64 96 128 192 256)
set(SPILLS_forward 32 32 208 192 96)
set(SPILLS_backward 336 128 128 176 240)
foreach(d spills_forward spills_backward IN ZIP_LISTS HEAD_DIMS SPILLS_forward SPILLS_backward)
  foreach(pass forward backward)
    cuda_object(sm90_${pass}_${d} csrc/cuda/sm90/${pass}.cu SPILLS ${spills_${pass}}
                FLAGS ${HOPPER} -DSM90_HEAD_DIM=${d})
  endforeach()
endforeach()

pybind11_add_module(_cuda csrc/ffi/cuda_module.cc csrc/ffi/decode.cc csrc/ffi/decode_append.cc
                    csrc/cuda/dispatch.cc csrc/cuda/sm90/tensor_maps.cc ${CUDA_OBJECTS})
target_include_directories(_cuda PRIVATE csrc)
target_include_directories(_cuda SYSTEM PRIVATE "${JAXLIB_DIR}/include" "${CUDA_INCLUDE}")
target_link_libraries(_cuda PRIVATE "${CUDART_STATIC}" dl rt pthread)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
install(TARGETS _cuda LIBRARY DESTINATION jax_flashattn)
