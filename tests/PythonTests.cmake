# normd_python_tests(LEVEL NAMES...): registers NAME_test.py of the current folder
# as the test LEVEL.NAME. Each starts real servers of this build.
include_guard(GLOBAL)

# Debian's modules (grpc, torch, sklearn) belong to this interpreter, whatever
# else comes first on the PATH.
set(NORMD_PYTHON /usr/bin/python3 CACHE FILEPATH "Python with grpcio, torch, numpy and sklearn")

function(normd_python_tests level)
  foreach(name ${ARGN})
    add_test(NAME ${level}.${name}
      COMMAND ${NORMD_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/${name}_test.py --verbose)
    set_tests_properties(${level}.${name} PROPERTIES
      LABELS ${level}
      TIMEOUT 900
      ENVIRONMENT "NORMD_BIN=${CMAKE_BINARY_DIR}/bin/normd;NORMCTL_BIN=${CMAKE_BINARY_DIR}/bin/normctl;PYTHONPATH=${PROJECT_SOURCE_DIR}/tests:${CMAKE_BINARY_DIR}/python;PYTHONDONTWRITEBYTECODE=1")
  endforeach()
endfunction()
