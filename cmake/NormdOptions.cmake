# What every target is compiled with. Included by the project and by kernels/ when
# that is built alone.
include_guard(GLOBAL)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

set(NORMD_SANITIZE "" CACHE STRING "Sanitizers, as -fsanitize= takes them: address,undefined or thread")

find_program(CCACHE ccache)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
endif()

if(NORMD_SANITIZE)
  add_compile_options(-fsanitize=${NORMD_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${NORMD_SANITIZE})
endif()

# Our own targets link this one.
add_library(normd_options INTERFACE)
target_compile_options(normd_options INTERFACE
  $<BUILD_INTERFACE:$<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wno-missing-field-initializers -Wnon-virtual-dtor -Woverloaded-virtual>>)
if(NORMD_SANITIZE)
  # GCC's manual: with a sanitizer this warning has false positives (in <regex>).
  target_compile_options(normd_options INTERFACE
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>)
endif()
if(NORMD_SANITIZE STREQUAL "thread")
  # Abseil's headers have fences, which ThreadSanitizer does not see.
  target_compile_options(normd_options INTERFACE
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-tsan>)
endif()
get_filename_component(NORMD_ROOT ${CMAKE_CURRENT_LIST_DIR} DIRECTORY)
target_include_directories(normd_options INTERFACE $<BUILD_INTERFACE:${NORMD_ROOT}>)
find_package(Threads REQUIRED)
target_link_libraries(normd_options INTERFACE Threads::Threads)
