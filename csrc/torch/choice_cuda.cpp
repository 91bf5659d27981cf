#include "torch/choice_cuda.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>

#include "cuda/backend.h"
#include "torch/cudnn_cuda.h"
#include "torch/device.h"
#include "torch/families_cuda.h"
#include "torch/ops_cuda.h"
#include "torch/settings.h"

namespace fused_rnn {
namespace {

// What an answer depends on. Numbers of steps share it up to the next power of two, as in fused_rnn/tuning/choice.py.
struct Key {
  std::array<int64_t, 9> numbers;

  bool operator==(const Key& other) const { return numbers == other.numbers; }
};
struct HashOfKey {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (int64_t number : key.numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3;
    return hash ^ hash >> 32;
  }
};

// Answers that last, and the families that may be offered while there is none.
struct Entry {
  std::optional<Family> family;
  std::vector<Family> ours;
};

class Choices {
 public:
  std::optional<Entry> find(const Key& key) {
    const std::shared_lock lock(mutex_);
    const auto found = entries_.find(key);
    return found == entries_.end() ? std::nullopt : std::optional<Entry>(found->second);
  }
  // The family of an answer that lasts: what a call asks in the long run.
  std::optional<Family> family(const Key& key) {
    const std::shared_lock lock(mutex_);
    const auto found = entries_.find(key);
    return found == entries_.end() ? std::nullopt : found->second.family;
  }
  void keep(const Key& key, Entry entry) {
    const std::unique_lock lock(mutex_);
    if (entries_.size() >= kMost) entries_.clear();
    entries_[key] = std::move(entry);
  }
  void clear() {
    const std::unique_lock lock(mutex_);
    entries_.clear();
  }
  std::shared_ptr<const Chooser> chooser() {
    const std::shared_lock lock(mutex_);
    return chooser_;
  }
  void set_chooser(Chooser chooser) {
    const std::unique_lock lock(mutex_);
    chooser_ = chooser ? std::make_shared<const Chooser>(std::move(chooser)) : nullptr;
    entries_.clear();
  }

 private:
  static constexpr size_t kMost = 4096;
  std::shared_mutex mutex_;
  std::unordered_map<Key, Entry, HashOfKey> entries_;
  std::shared_ptr<const Chooser> chooser_;
};
// Never destroyed: the chooser is Python's, which may have ended by then.
Choices& choices() {
  static Choices& all = *new Choices;
  return all;
}

int64_t next_power(int64_t number) {
  int64_t power = 1;
  while (power < number) power *= 2;
  return power;
}

// Sizes of a call whose layout is not checked yet: false where they are no call's, or where there is nothing to choose, as
// nothing compares families on modified steps.
bool measure(const Call& s, Question& q) {
  Problem& p = q.problem;
  const bool packed = s.rows.offsets.has_value();
  const int64_t groups = s.recipe.num_layers * s.recipe.directions();
  if (s.params.size() < 2 || static_cast<int64_t>(s.params.size()) % groups || s.x.dim() != (packed || s.one_step ? 2 : 3) ||
      s.params[0].dim() != 2 || s.params[1].dim() != 2 || !s.x.is_floating_point() || s.rows.options.any() ||
      !s.rows.reset_states.empty()) {
    return false;
  }
  p = {};
  p.cell = s.recipe.cell;
  p.dtype = dtype_of(s.x);
  p.allow_tf32 = allows_tf32(s.x);
  p.D = static_cast<int>(s.recipe.directions());
  p.I = s.x.size(-1);
  p.H = s.params[1].size(0) / gate_count(p.cell);
  p.P = s.params[1].size(1);
  p.ragged = s.rows.ragged();
  if (packed) {
    if (!s.h0() || s.h0()->dim() != 3) return false;
    p.T = s.rows.offsets->size(0) - 1;
    p.B = s.h0()->size(1);
  } else if (s.one_step) {
    p.T = 1;
    p.B = s.x.size(0);
  } else {
    p.T = s.x.size(s.recipe.batch_first ? 1 : 0);
    p.B = s.x.size(s.recipe.batch_first ? 0 : 1);
  }
  q.layers = s.recipe.num_layers;
  q.one_step = s.one_step;
  q.device = static_cast<int>(s.x.get_device());
  q.deterministic = at::globalContext().deterministicAlgorithms();
  return p.T >= 1 && p.B >= 1 && p.H >= 1 && p.P >= 1;
}

bool drops(const Recipe& r) { return r.training && r.dropout > 0 && r.num_layers > 1; }

Key key_of(const Call& s, const Question& q) {
  const Problem& p = q.problem;
  int64_t bits = static_cast<int64_t>(p.cell);
  int shift = 8;
  const auto add = [&](int64_t value, int width) {
    bits |= value << shift;
    shift += width;
  };
  add(static_cast<int64_t>(p.dtype), 4);
  add(p.D, 2);
  for (bool bit :
       {p.allow_tf32, q.one_step, q.training, q.cudnn, q.deterministic, q.call == nullptr, s.has_wide_c(), drops(s.recipe),
        s.recipe.has_biases, s.rows.lengths.has_value(), s.rows.offsets.has_value(), s.rows.resets.has_value()}) {
    add(bit, 1);
  }
  return {{bits, next_power(p.T), p.B, p.I, p.H, p.P, q.layers, q.device, p.T > 1}};
}

std::string rows_text(const Call& s) {
  std::string text = s.rows.offsets ? "packed" : s.rows.lengths ? "lengths" : "dense";
  if (s.rows.resets) text += "+resets";
  if (drops(s.recipe)) text += "+dropout";
  if (s.has_wide_c()) text += "+wide c";
  return text;
}

// The planned microseconds of a call by a family, if it can serve all layers, forward and backward.
std::optional<double> planned_us(const Question& q, Family family, const FamilyChoice& now) {
  if (*now.obstacle(family)) return std::nullopt;
  Problem p = q.problem;
  double us = 0;
  for (int64_t layer = 0; layer < std::min<int64_t>(q.layers, 2); ++layer) {
    p.I = layer == 0 ? q.problem.I : p.D * p.P;
    for (bool backward : {false, true}) {
      if (backward && !q.training) continue;
      p.training = q.training;
      p.backward = backward;
      try {
        us += make_plan(p, cuda::device_info(q.device), {family, false}).us;
      } catch (const std::invalid_argument&) {  // says why not
        return std::nullopt;
      }
    }
  }
  return us;
}

// A family without prospects is not worth its verification and turns: one that plans do not take by themselves, where the
// model, which no GPU has corrected yet, has a family of ours that is so many times as fast.
constexpr double kHopeless = 4;

// The planner's own choice is the first.
std::vector<Family> offered(const Question& q) {
  std::vector<Family> all;
  std::vector<double> us;
  const FamilyChoice now = family_choice(q.device, Recipe{});
  for (bool automatic : {true, false}) {
    for (Family family : kFamilies) {
      const FamilyTraits traits = traits_of(family);
      if (traits.stacks || traits.automatic != automatic) continue;
      if (const auto planned = planned_us(q, family, now)) all.push_back(family), us.push_back(*planned);
    }
  }
  std::vector<Family> promising;
  for (size_t i = 0; i < all.size(); ++i) {
    if (traits_of(all[i]).automatic || us[i] <= kHopeless * *std::min_element(us.begin(), us.end()))
      promising.push_back(all[i]);
  }
  return promising;
}

// The chooser's answer, or none where nobody is to be asked.
Answer ask(const Call& s, Question& q) {
  const Key key = key_of(s, q);
  if (const auto family = choices().family(key)) return {family, std::nullopt, true};
  const auto chooser = choices().chooser();
  if (!chooser) return {};
  const auto known = choices().find(key);
  q.ours = known ? known->ours : offered(q);
  if (!known) choices().keep(key, {std::nullopt, q.ours});
  if (q.ours.empty() && !q.cudnn) return {};  // the planner says why
  q.rows = rows_text(s);
  q.may_time = q.call && !is_captured();
  const Answer answer = (*chooser)(q);
  if (answer.lasting && answer.family) choices().keep(key, {answer.family, q.ours});
  return answer;
}

// By cuDNN; none, after a warning, if it turns out not to support the call: the planner's own family serves such calls then.
template <class F>
auto try_cudnn(const Call& s, const Question& q, const F& by_cudnn) -> std::optional<decltype(by_cudnn())> {
  try {
    return by_cudnn();
  } catch (const c10::Error& error) {
    const std::vector<Family> ours = offered(q);
    if (!std::strstr(error.what_without_backtrace(), "cuDNN error") || ours.empty()) throw;
    TORCH_WARN("fused_rnn: kernel family ", to_string(ours[0]), " serves calls of this size (T=", q.problem.T,
               ", B=", q.problem.B, ", H=", q.problem.H, "), which cuDNN refuses: ", error.what_without_backtrace());
    choices().keep(key_of(s, q), {ours[0], ours});
    return std::nullopt;
  }
}

Results by_family(const Call& s, std::optional<Family> family, const std::function<Results(const Call&)>& rest) {
  Call call{s.x, s.states, s.params, s.rows, s.recipe, s.one_step};
  call.recipe.family = family ? number_of(*family) : 0;
  return rest(call);
}

bool is_seen(const Call& s) {
  const auto plain = [](const Tensor& t) { return is_on_device(t) && is_plain(t); };
  return !nothing_intercepts() || !plain(s.x) || !std::all_of(s.states.begin(), s.states.end(), plain) ||
         !std::all_of(s.params.begin(), s.params.end(), plain);
}

}  // namespace

void set_chooser(Chooser chooser) { choices().set_chooser(std::move(chooser)); }
bool has_chooser() { return choices().chooser() != nullptr; }
void forget_choices() { choices().clear(); }

Results run_chosen(const Call& s, const std::function<Results(const Call&)>& rest) {
  const FamilyChoice setting = family_setting();
  const std::optional<Family> named = setting.forced ? setting.forced : family_of(s.recipe);
  if (named == Family::kCudnn && !s.one_step) {
    const std::string lacking = cudnn_lacks(s);
    TORCH_CHECK_VALUE(lacking.empty(), "kernel family cudnn cannot serve this call: cuDNN ", lacking);
    return cudnn_fits(s) ? rnn_by_cudnn(s) : rest(s);
  }
  if (named || setting.cheapest || is_seen(s)) return rest(s);
  Question q{};
  if (!measure(s, q)) return rest(s);
  q.training = differentiates(s);
  q.cudnn = cudnn_lacks(s).empty() && cudnn_fits(s);
  q.call = &s;
  Answer answer = ask(s, q);
  if (answer.results) return *std::move(answer.results);
  if (!answer.family && q.cudnn) answer.family = Family::kCudnn;
  if (answer.family == Family::kCudnn) {
    if (auto results = try_cudnn(s, q, [&] { return rnn_by_cudnn(s); })) return *std::move(results);
    answer.family = choices().family(key_of(s, q));
  }
  return by_family(s, answer.family, rest);
}

bool is_plain_call(const Call& call) {
  return !call.recipe.all_states && call.rows.reset_states.empty() && !call.rows.options.any() && !call.has_ids();
}

// A layer's op does not save what cuDNN keeps for backward, so cuDNN serves no training call here.
LayerChoice chosen_for_layer(const Call& layer, bool training) {
  LayerChoice choice{layer.recipe, std::nullopt};
  const FamilyChoice setting = family_setting();
  Question q{};
  if (layer.recipe.family || setting.forced || setting.cheapest || !measure(layer, q)) return choice;
  q.training = training;
  q.cudnn = !training && is_plain_call(layer) && cudnn_lacks(layer).empty() && cudnn_fits(layer);
  std::optional<Family> family = ask(layer, q).family;
  if (!family && q.cudnn) family = Family::kCudnn;
  if (family == Family::kCudnn) {
    const at::AutoGradMode without_grad(false);
    choice.results = try_cudnn(layer, q, [&] { return rnn_by_cudnn(layer); });
    if (!choice.results) family = choices().family(key_of(layer, q));
  }
  if (family && !choice.results) choice.recipe.family = number_of(*family);
  return choice;
}

LayerOutputs run_chosen_part(const Call& s, const std::function<LayerOutputs()>& by_cudnn,
                             const std::function<LayerOutputs(const Recipe&)>& rest) {
  Recipe recipe = s.recipe;
  recipe.family = 0;
  const FamilyChoice setting = family_setting();
  if (setting.forced == Family::kCudnn) {
    const std::string lacking = cudnn_lacks(s);
    TORCH_CHECK_VALUE(lacking.empty(), "kernel family cudnn cannot serve this call: cuDNN ", lacking);
    return cudnn_fits(s) ? by_cudnn() : rest(recipe);
  }
  Question q{};
  if (setting.forced || setting.cheapest || !measure(s, q)) return rest(recipe);
  q.training = true;
  q.cudnn = cudnn_lacks(s).empty() && cudnn_fits(s);
  std::optional<Family> family = ask(s, q).family;
  if (!family && q.cudnn) family = Family::kCudnn;
  if (family == Family::kCudnn) {
    if (auto made = try_cudnn(s, q, by_cudnn)) return *std::move(made);
    family = choices().family(key_of(s, q));
  }
  if (family) recipe.family = number_of(*family);
  return rest(recipe);
}

}  // namespace fused_rnn
