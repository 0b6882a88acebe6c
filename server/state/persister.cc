#include "server/state/persister.h"
