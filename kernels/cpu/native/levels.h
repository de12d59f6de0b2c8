// The instruction sets of this processor, best last, and the one in use.
#pragma once

#include "level.h"

int level_count();
const Level& level_at(int index);
const Level& level();           // the one in use: the best, unless another was chosen
bool choose_level(const char* name);  // false if this processor or this build has no such level
