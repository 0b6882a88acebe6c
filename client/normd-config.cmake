# find_package(normd CONFIG): the C++ client, as normd::normd_client.
include(CMakeFindDependencyMacro)
find_dependency(Protobuf)
find_dependency(gRPC CONFIG)
find_dependency(absl CONFIG)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/normd_targets.cmake)
