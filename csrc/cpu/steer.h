// The CPU op: check, choose the instruction set, share the rows out to threads.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace steerkern::cpu {

// Runs a call. Returns -1, or the first row whose slot, span or links reach outside the tables; then nothing was
// written.
int64_t steer(const Call& call, Dtype dtype, int threads);

// Threads that a call of this size is worth.
int useful_threads(int64_t n, int64_t width, int threads);

// Instruction sets of this build that this machine runs, the preferred one first.
std::vector<std::string> supported_isas();
std::string isa();
bool set_isa(const std::string& name);

}  // namespace steerkern::cpu
