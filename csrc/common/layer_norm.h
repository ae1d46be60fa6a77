// What layer_norm and add_layer_norm are on CPUs and on GPUs alike: checks, and two ops made of one kernel each way.
#pragma once

#include <optional>
#include <tuple>

#include "tensor.h"

namespace fastgpt {
namespace {

// For each device its own. (sum, y, mean, rstd); without a residual, `sum` is x itself.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(
    Tensor x, std::optional<Tensor> residual, Tensor weight, Tensor bias, double eps);

// (dx, dweight, dbias). `x` is what was normed; `dsum`, its gradient by other ways than the norm, may be absent.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    Tensor dy, std::optional<Tensor> dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd);

bool same_kind(const Tensor& a, const Tensor& b) {
  return a.numel() == b.numel() && a.scalar_type() == b.scalar_type() && a.get_device_index() == b.get_device_index();
}

// The public Python functions say all this better; here it only keeps a direct call from reading past an end.
void check_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "layer_norm: x must have a last dimension of at least 1");
  for (const Tensor& t : {weight, bias}) {
    STD_TORCH_CHECK(
        t.dim() == 1 && t.size(0) == x.size(-1), "layer_norm: weight must be 1-D, as long as x's last dimension, and bias");
    STD_TORCH_CHECK(
        t.get_device_index() == x.get_device_index(), "layer_norm: x and its parameters must be on one device");
  }
  STD_TORCH_CHECK(bias.scalar_type() == weight.scalar_type(), "layer_norm: bias must have weight's dtype");
  STD_TORCH_CHECK(
      !residual || same_kind(*residual, x), "add_layer_norm: residual must have x's shape, dtype and device");
}

void check_norm_backward(
    const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd) {
  check_norm(x, std::nullopt, weight, weight);
  STD_TORCH_CHECK(same_kind(dy, x), "layer_norm_backward: dy must have x's shape, dtype and device");
  STD_TORCH_CHECK(
      !dsum || same_kind(*dsum, x), "add_layer_norm_backward: dsum must have the sum's shape, dtype and device");
  for (const Tensor& t : {mean, rstd}) {
    STD_TORCH_CHECK(
        t.numel() == x.numel() / x.size(-1) && t.scalar_type() == sums_type(x),
        "layer_norm_backward: mean and rstd must be what layer_norm returned for this x");
  }
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps) {
  auto [sum, y, mean, rstd] = normalize(x, std::nullopt, weight, bias, eps);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps) {
  return normalize(x, residual, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  return normalize_backward(dy, std::nullopt, x, weight, mean, rstd);
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(
    Tensor dnorm, std::optional<Tensor> dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd) {
  return normalize_backward(dnorm, dsum, sum, weight, mean, rstd);
}

}  // namespace
}  // namespace fastgpt
