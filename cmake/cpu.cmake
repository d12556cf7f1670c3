# The CPU extension: one kernel source per pass, compiled once per instruction set.

set(KERNEL_FLAGS -O2 -ffp-contract=fast -fno-math-errno -Wall)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Loops over a few vectors unroll whole. The rest of -O3 takes twice as long and gains nothing.
  list(APPEND KERNEL_FLAGS -fpeel-loops)
  list(APPEND KERNEL_FLAGS -Wno-maybe-uninitialized -Wno-uninitialized) # GCC 12 warns inside its own intrinsics
endif()

set(CPU_ISAS baseline)
set(CPU_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND CPU_ISAS avx2 avx512 avx512_bf16 amx)
  set(CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(CPU_FLAGS_avx512 ${CPU_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(CPU_FLAGS_avx512_bf16 ${CPU_FLAGS_avx512} -mavx512bf16)
  set(CPU_FLAGS_amx ${CPU_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)
endif()

set(CPU_OBJECTS "")
foreach(isa IN LISTS CPU_ISAS)
  add_library(cpu_${isa} OBJECT csrc/cpu/forward.cc csrc/cpu/backward.cc csrc/cpu/tangent.cc
              csrc/cpu/cached.cc)
  target_include_directories(cpu_${isa} PRIVATE csrc)
  target_compile_definitions(cpu_${isa} PRIVATE FLASH_ISA=${isa})
  target_compile_options(cpu_${isa} PRIVATE ${KERNEL_FLAGS} ${CPU_FLAGS_${isa}})
  list(APPEND CPU_OBJECTS $<TARGET_OBJECTS:cpu_${isa}>)
endforeach()

pybind11_add_module(_cpu csrc/ffi/cpu_module.cc csrc/ffi/decode.cc csrc/ffi/decode_append.cc
                    csrc/cpu/dispatch.cc csrc/cpu/append.cc ${CPU_OBJECTS})
target_include_directories(_cpu PRIVATE csrc)
target_include_directories(_cpu SYSTEM PRIVATE "${JAXLIB_DIR}/include")
install(TARGETS _cpu LIBRARY DESTINATION jax_flashattn)
