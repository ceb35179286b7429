#pragma once

#include <pybind11/pybind11.h>

namespace steerkern {

void bind_cuda(pybind11::module_& m);

}  // namespace steerkern
