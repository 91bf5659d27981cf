// The chooser of kernel families that Python sets (choice_cuda.h); without CUDA kernels nobody is asked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan/family.h"
#ifdef FUSED_RNN_WITH_CUDA
#include <torch/csrc/autograd/python_variable.h>

#include "torch/choice_cuda.h"
#include "torch/families_cuda.h"
#include "torch/second_order.h"
#endif

namespace fused_rnn {
namespace {

namespace py = pybind11;

#ifdef FUSED_RNN_WITH_CUDA

py::object wrap(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

py::list list_of(at::TensorList tensors) {
  py::list list;
  for (const Tensor& t : tensors) list.append(wrap(t));
  return list;
}

py::dict to_dict(const Question& q) {
  const Problem& p = q.problem;
  std::vector<std::string> ours;
  for (Family family : q.ours) ours.emplace_back(to_string(family));
  using py::arg;
  return py::dict(arg("cell") = traits_of(p.cell).name, arg("dtype") = kDTypeNames[static_cast<int>(p.dtype)],
                  arg("tf32") = p.allow_tf32, arg("T") = p.T, arg("B") = p.B, arg("I") = p.I, arg("H") = p.H, arg("P") = p.P,
                  arg("layers") = q.layers, arg("directions") = p.D, arg("training") = q.training, arg("rows") = q.rows,
                  arg("device") = q.device, arg("cudnn") = q.cudnn, arg("ours") = ours, arg("may_time") = q.may_time,
                  arg("deterministic") = q.deterministic, arg("one_step") = q.one_step);
}

// The arguments of the op that the call came by.
py::object to_tuple(const Call* call) {
  if (!call) return py::none();
  Rows rows = call->rows;
  if (rows.host_offsets) rows.offsets = rows.host_offsets;
  const RowList list = list_of(rows);
  return py::make_tuple(wrap(call->x), list_of(call->states), list_of(call->params), list_of(list.tensors),
                        pack(call->recipe) | list.bits, call->recipe.dropout);
}

std::optional<Family> family_named(const py::object& name) {
  if (name.is_none()) return std::nullopt;
  return parse_choice(name.cast<std::string>()).forced;
}

// chooser(question, arguments) -> (family or None, (y, last states) or None, whether it lasts)
Answer ask_python(const py::object& chooser, const Question& question) {
  const py::gil_scoped_acquire gil;
  const py::tuple made = chooser(to_dict(question), to_tuple(question.call));
  Answer answer{family_named(made[0]), std::nullopt, made[2].cast<bool>()};
  if (!made[1].is_none()) {
    const py::tuple results = made[1];
    Results unwrapped{THPVariable_Unpack(py::object(results[0]).ptr()), {}};
    for (const py::handle& state : py::list(results[1])) unwrapped.last.push_back(THPVariable_Unpack(state.ptr()));
    answer.results = std::move(unwrapped);
  }
  return answer;
}

void set_python_chooser(const py::object& chooser) {
  if (chooser.is_none()) return set_chooser(nullptr);
  const auto* const owned = new py::object(chooser);  // Python may have ended before the last call
  set_chooser([owned](const Question& question) { return ask_python(*owned, question); });
}

#endif

}  // namespace

void bind_choice(py::module_& m) {
#ifdef FUSED_RNN_WITH_CUDA
  m.def("set_chooser", &set_python_chooser, py::arg("chooser"),
        "chooser(question, arguments) -> (family or None, (y, last states) or None, whether the answer lasts): asked by "
        "calls on a GPU whose family nothing has decided (csrc/torch/choice_cuda.h). None: nobody is asked.");
  m.def("forget_choices", &forget_choices, "Forgets the answers of the chooser that last.");
  m.def(
      "exclude_families",
      [](const std::vector<std::string>& names, int device) {
        std::vector<Family> families;
        for (const std::string& name : names) families.push_back(*parse_choice(name).forced);
        exclude_families(families, device);
      },
      py::arg("families"), py::arg("device"), "Those that do not serve on the device, having failed their verification.");
  m.def("second_order_is_proven", &second_order_is_proven, py::arg("device"),
        "From now on the kernels' second derivatives and tangents serve on the device.");
#endif
  std::vector<std::string> names;
  for (Family family : kFamilies) names.emplace_back(to_string(family));
  m.attr("families") = names;
}

}  // namespace fused_rnn
