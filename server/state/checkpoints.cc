#include "server/state/checkpoints.h"
