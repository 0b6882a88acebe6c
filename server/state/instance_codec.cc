#include "server/state/instance_codec.h"
