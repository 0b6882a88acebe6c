#include "server/state/sqlite_store.h"
