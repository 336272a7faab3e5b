# SPDX-License-Identifier: Apache-2.0
# jaxwin_write_kernel_sources(OUT): the CUDA kernels' source as string literals, one line
# JAXWIN_KERNEL_SOURCE(name, text) each, and the hash of all of them as `hash`. NVRTC compiles them
# where the program runs, so building needs no CUDA.

set(JAXWIN_CUDA_DIR "${CMAKE_CURRENT_LIST_DIR}")

function(jaxwin_write_kernel_sources out)
  set(text)
  set(hashes)
  file(GLOB kernels CONFIGURE_DEPENDS "${JAXWIN_CUDA_DIR}/kernels/*.cuh")
  foreach(file IN ITEMS "${JAXWIN_CUDA_DIR}/args.h" LISTS kernels)
    get_filename_component(name "${file}" NAME_WE)
    file(READ "${file}" source)
    file(SHA256 "${file}" hash)
    string(APPEND hashes "${hash}")
    string(REPLACE "#pragma once\n" "" source "${source}")
    string(APPEND text "JAXWIN_KERNEL_SOURCE(${name}, R\"jaxwin(${source})jaxwin\")\n")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
  endforeach()
  string(SHA256 hash "${hashes}")
  string(SUBSTRING "${hash}" 0 16 hash)
  string(APPEND text "JAXWIN_KERNEL_SOURCE(hash, \"${hash}\")\n")
  file(GENERATE OUTPUT "${out}" CONTENT "${text}")
endfunction()
