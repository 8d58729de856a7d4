// Asks whether modules have changed: their attributes, parameters, buffers, hooks and classes. The same look
// in Python, before every forward of a deep net, costs as much as its small layers.
#pragma once

#include <pybind11/pybind11.h>

namespace effdense {

// What `module_state_is` compares; it keeps what it names alive.
pybind11::tuple module_state(const pybind11::list& modules);

// Whether everything is still the same object, in dictionaries too, and every tensor has the same dtype,
// device, sizes, strides and requires_grad. What is in lists and in other objects is not compared, nor are a
// tensor's values.
bool module_state_is(const pybind11::tuple& records);

}  // namespace effdense
