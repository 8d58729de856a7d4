// Whether modules have changed since a look at them; see module_state.h.
#include "module_state.h"

#include <torch/csrc/autograd/python_variable.h>

namespace effdense {
namespace {

namespace py = pybind11;

// What a tensor is apart from its values, in one number.
size_t facts_of(const at::Tensor& x) {
  size_t hash = reinterpret_cast<size_t>(x.unsafeGetTensorImpl());
  const auto add = [&](size_t fact) { hash = (hash ^ fact) * 0x9E3779B97F4A7C15u + (hash >> 29); };
  add(static_cast<size_t>(x.scalar_type()));
  add(static_cast<size_t>(x.device().type()) << 8 | static_cast<uint8_t>(x.device().index()));
  add(static_cast<size_t>(x.layout()) << 1 | static_cast<size_t>(x.requires_grad()));
  for (const int64_t size : x.sizes()) add(static_cast<size_t>(size));
  if (x.layout() == at::kStrided)
    for (const int64_t stride : x.strides()) add(static_cast<size_t>(stride));
  return hash;
}

// A module's own dictionary.
py::object state_of(PyObject* module) {
  PyObject* state = PyObject_GenericGetDict(module, nullptr);
  if (state == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(state);
}

// Of a dictionary: its keys and values, one after the other. With each value a tensor is, `facts` takes it
// in.
bool may_be_tensor(PyObject* value) {
  constexpr unsigned long kOthers = Py_TPFLAGS_LONG_SUBCLASS | Py_TPFLAGS_LIST_SUBCLASS |
                                    Py_TPFLAGS_TUPLE_SUBCLASS | Py_TPFLAGS_UNICODE_SUBCLASS |
                                    Py_TPFLAGS_DICT_SUBCLASS;
  return value != Py_None && !PyFloat_CheckExact(value) && !PyType_HasFeature(Py_TYPE(value), kOthers);
}

template <typename Visit>
bool for_items(PyObject* dictionary, const Visit& visit) {
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  while (PyDict_Next(dictionary, &position, &key, &value))
    if (!visit(key, value)) return false;
  return true;
}

py::tuple items_of(PyObject* dictionary, size_t& facts) {
  py::tuple items(2 * PyDict_Size(dictionary));
  Py_ssize_t i = 0;
  for_items(dictionary, [&](PyObject* key, PyObject* value) {
    Py_INCREF(key);
    PyTuple_SET_ITEM(items.ptr(), i++, key);
    Py_INCREF(value);
    PyTuple_SET_ITEM(items.ptr(), i++, value);
    if (may_be_tensor(value) && THPVariable_Check(value))
      facts += facts_of(THPVariable_Unpack(value)) + static_cast<size_t>(i);
    return true;
  });
  return items;
}

bool same_items(PyObject* dictionary, PyObject* items, size_t& facts) {
  if (2 * PyDict_Size(dictionary) != PyTuple_GET_SIZE(items)) return false;
  Py_ssize_t i = 0;
  return for_items(dictionary, [&](PyObject* key, PyObject* value) {
    if (PyTuple_GET_ITEM(items, i++) != key || PyTuple_GET_ITEM(items, i++) != value) return false;
    if (may_be_tensor(value) && THPVariable_Check(value))
      facts += facts_of(THPVariable_Unpack(value)) + static_cast<size_t>(i);
    return true;
  });
}

// Python gives a class another number when it, or a base of it, is changed; 0 where it has none.
unsigned int version_of(PyTypeObject* type) {
  if (type->tp_version_tag == 0) {  // looking something up gives it one
    PyObject* forward = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "forward");
    if (forward == nullptr) PyErr_Clear();
    Py_XDECREF(forward);
  }
  return type->tp_version_tag;
}

// A module, its class and that one's version, the items of its dictionary, those of every dictionary in
// there, and the facts of all tensors.
enum Part { kModule, kType, kVersion, kItems, kInner, kFacts, kParts };

}  // namespace

py::tuple module_state(const py::list& modules) {
  py::tuple records(modules.size());
  for (size_t m = 0; m < modules.size(); ++m) {
    const py::object module = modules[m], state = state_of(module.ptr());
    size_t facts = 0;
    const py::tuple items = items_of(state.ptr(), facts);
    py::list inner;
    for (size_t i = 1; i < items.size(); i += 2)
      if (PyDict_Check(py::object(items[i]).ptr())) inner.append(items_of(py::object(items[i]).ptr(), facts));
    py::tuple record(static_cast<size_t>(kParts));
    record[kModule] = module;
    record[kType] = py::type::of(module);
    record[kVersion] = py::int_(version_of(Py_TYPE(module.ptr())));
    record[kItems] = items;
    record[kInner] = py::tuple(inner);
    record[kFacts] = py::int_(facts);
    records[m] = record;
  }
  return records;
}

bool module_state_is(const py::tuple& records) {
  for (size_t m = 0; m < records.size(); ++m) {
    PyObject* record = PyTuple_GET_ITEM(records.ptr(), static_cast<Py_ssize_t>(m));
    const auto part = [&](Part i) { return PyTuple_GET_ITEM(record, static_cast<Py_ssize_t>(i)); };
    PyObject* module = part(kModule);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != part(kType)) return false;
    const unsigned int version = version_of(Py_TYPE(module));
    if (version == 0 || version != PyLong_AsUnsignedLong(part(kVersion))) return false;
    size_t facts = 0;
    const py::object state = state_of(module);
    PyObject* items = part(kItems);
    if (!same_items(state.ptr(), items, facts)) return false;
    Py_ssize_t inner = 0;
    for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(items); i += 2) {
      PyObject* value = PyTuple_GET_ITEM(items, i);
      if (PyDict_Check(value) && !same_items(value, PyTuple_GET_ITEM(part(kInner), inner++), facts))
        return false;
    }
    if (facts != PyLong_AsSize_t(part(kFacts))) return false;
  }
  return true;
}

}  // namespace effdense
