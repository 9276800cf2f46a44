// Whether this CPU and this process can use the tile unit.
#pragma once

#include <string>

namespace nsru::cpu {

// Why not, in words; empty where it can. Asks the kernel for permission once.
std::string unavailable();

}  // namespace nsru::cpu
