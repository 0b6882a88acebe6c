#include <iostream>

#include <unistd.h>

#include "client/normctl/normctl.h"

int main(int argc, char** argv) {
  return normd::normctl::Run({argv + 1, argv + argc}, std::cout, std::cerr,
                             isatty(STDERR_FILENO) == 1);
}
