// The machine that the kernel is compiled for: a GPU, or what a test puts in its place.
#pragma once

#if defined(STEER_MACHINE)
#include STEER_MACHINE
#else
#include "machine.h"
#endif
