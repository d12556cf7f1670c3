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

# cuda_object(<variable> <source> <flags...>) compiles one source; the log keeps ptxas's report of
# registers and spills.
function(cuda_object objects source)
  string(MAKE_C_IDENTIFIER "${source}" name)
  set(object "${CMAKE_CURRENT_BINARY_DIR}/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/build_support/run_nvcc.py"
            "${object}.ptxas.log" "${NVCC}" ${NVCC_FLAGS} ${ARGN} -MD -MF "${object}.d" -c
            "${CMAKE_CURRENT_SOURCE_DIR}/${source}" -o "${object}"
    DEPENDS "${source}" build_support/run_nvcc.py
    DEPFILE "${object}.d"
    VERBATIM)
  set(${objects} ${${objects}} "${object}" PARENT_SCOPE)
endfunction()

# Machine code for Ampere and PTX for everything after it.
set(PORTABLE -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80)
cuda_object(CUDA_OBJECTS csrc/cuda/plain/attention.cu ${PORTABLE})

pybind11_add_module(_cuda csrc/ffi/cuda_module.cc csrc/ffi/decode.cc ${CUDA_OBJECTS})
target_include_directories(_cuda PRIVATE csrc)
target_include_directories(_cuda SYSTEM PRIVATE "${JAXLIB_DIR}/include" "${CUDA_INCLUDE}")
target_link_libraries(_cuda PRIVATE "${CUDART_STATIC}" dl rt pthread)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
install(TARGETS _cuda LIBRARY DESTINATION jax_flashattn)
