#include "kernel.h"

#define STEER_ISA "portable"
#define STEER_NATIVE 4
namespace steerkern::cpu {
#include "lanes.h"
#include "passes.h"
#include "rows.h"
const Isa* portable_isa() { return &kIsa; }
}  // namespace steerkern::cpu
