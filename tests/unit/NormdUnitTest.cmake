# normd_unit_test(NAME SOURCES... LIBRARIES...): one GoogleTest program.
function(normd_unit_test name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  if(NORMD_SANITIZE STREQUAL "thread")
    target_sources(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests/tsan/absl_mutex.cc)
  endif()
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} normd_options GTest::gmock GTest::gtest_main)
  # GCC 12 warns without reason where GoogleTest prints a protobuf message (GCC bug 105651).
  target_compile_options(${name} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)
  gtest_discover_tests(${name} TEST_PREFIX unit. DISCOVERY_TIMEOUT 60)
endfunction()
