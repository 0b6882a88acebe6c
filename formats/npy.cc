#include "formats/npy.h"
