# SPDX-License-Identifier: Apache-2.0
# jaxwin_write_kernel_sources(OUT): the CUDA kernels' source as string literals, one line
# JAXWIN_KERNEL_SOURCE(name, text) each, and the hash of all of them as `hash`. NVRTC compiles them
# where the program runs, so building needs no CUDA. And one line JAXWIN_CUDA_ABI(name, "hash") for
# each file that makes algorithms: the hash of what decides how fast these are, under which
# measurements are filed.

set(JAXWIN_CUDA_DIR "${CMAKE_CURRENT_LIST_DIR}")

function(jaxwin_write_kernel_sources out)
  set(text)
  set(everything)
  file(GLOB kernels CONFIGURE_DEPENDS "${JAXWIN_CUDA_DIR}/kernels/*.cuh")
  foreach(file IN ITEMS "${JAXWIN_CUDA_DIR}/args.h" LISTS kernels)
    get_filename_component(name "${file}" NAME_WE)
    file(READ "${file}" source)
    string(SHA256 hash "${source}")
    string(APPEND everything "${hash}")
    string(REPLACE "#pragma once\n" "" source "${source}")
    string(APPEND text "JAXWIN_KERNEL_SOURCE(${name}, R\"jaxwin(${source})jaxwin\")\n")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
  endforeach()
  string(SHA256 hash "${everything}")
  string(SUBSTRING "${hash}" 0 16 hash)
  string(APPEND text "JAXWIN_KERNEL_SOURCE(hash, \"${hash}\")\n")
  foreach(name IN ITEMS gemm few_channels lanes)
    set(hashes)
    foreach(file IN ITEMS args.h building.h building.cc "${name}.cc" kernels/device.cuh
                          kernels/helpers.cuh "kernels/${name}.cuh")
      file(SHA256 "${JAXWIN_CUDA_DIR}/${file}" hash)
      string(APPEND hashes "${hash}")
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${JAXWIN_CUDA_DIR}/${file}")
    endforeach()
    string(SHA256 hash "${hashes}")
    string(SUBSTRING "${hash}" 0 16 hash)
    string(APPEND text "JAXWIN_CUDA_ABI(${name}, \"${hash}\")\n")
  endforeach()
  file(GENERATE OUTPUT "${out}" CONTENT "${text}")
endfunction()
