// The servers that normd is measured against and that are written in C++.
#ifndef NORMD_TESTS_BENCHMARKS_TRANSPORT_SERVERS_H_
#define NORMD_TESTS_BENCHMARKS_TRANSPORT_SERVERS_H_

#include <string>

// Where a contender called `name` serves: a file with its TCP address, and a socket.
std::string PortFile(const std::string& directory, const std::string& name);
std::string SocketAddress(const std::string& directory, const std::string& name);

constexpr char kEchoChunks[] = "/chunks";
constexpr char kEchoHeldChunks[] = "/held_chunks";

// Serves there until the process is killed; returns its exit code.
//   echo      the floor: takes any bytes as a ByteBuffer, answers "/echo/N" with N, and
//             kEchoChunks with each message that comes, kEchoHeldChunks with them all when
//             the last has come
//   ordinary  the service as most would write it: generated, synchronous, the tensor's
//             bytes copied into a vector and back, plain loops between
int Serve(const std::string& name, const std::string& directory);

#endif  // NORMD_TESTS_BENCHMARKS_TRANSPORT_SERVERS_H_
