// SPDX-License-Identifier: Apache-2.0

#include "neighbours.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <tuple>

namespace jaxwin {
namespace {

constexpr size_t kMost = 3;  // whoever asks takes the first that the native core accepts

std::vector<int64_t> spatial(const std::vector<int64_t>& shape, const std::vector<int64_t>& spec) {
  std::vector<int64_t> result;
  result.reserve(spec.size());
  for (size_t i = 2; i < spec.size(); ++i) result.push_back(shape.at(spec[i]));
  return result;
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (const int64_t n : sizes) {
    // What a file says may be anything.
    if (__builtin_mul_overflow(result, n, &result)) return std::numeric_limits<int64_t>::max();
  }
  return result;
}

int64_t groups(const ConvParams& a) {
  return std::max({int64_t{1}, a.feature_group_count, a.batch_group_count});
}

}  // namespace

const char* direction(const ConvParams& a) {
  for (const int64_t d : a.lhs_dilation) {
    if (d > 1) return "dx";
  }
  const bool large =
      product(spatial(a.rhs_shape, a.rhs_spec)) > product(spatial(a.out_shape, a.out_spec));
  return a.batch_group_count > 1 || large ? "dw" : "fwd";
}

std::string kind(const ConvParams& a) {
  const std::string looks = direction(a);
  // The window of a weight gradient is as large as the images.
  const auto fixed = looks == "dw" ? spatial(a.out_shape, a.out_spec)  //
                                   : spatial(a.rhs_shape, a.rhs_spec);
  const bool depthwise = a.rhs_shape.at(a.rhs_spec.at(1)) == 1;
  std::string result;
  result.reserve(512);
  result += looks;
  result += a.feature_group_count == 1 ? " dense" : depthwise ? " depthwise" : " grouped";
  result += a.batch_group_count > 1 ? " batch groups" : "";
  for (const auto* values : {&fixed, &a.window_strides, &a.lhs_dilation, &a.rhs_dilation,
                             &a.rhs_reversal, &a.lhs_spec, &a.rhs_spec, &a.out_spec}) {
    result += ' ';
    result.append(reinterpret_cast<const char*>(values->data()), values->size() * sizeof(int64_t));
  }
  return result;
}

std::vector<int64_t> sizes(const ConvParams& a) {
  const int64_t features = a.rhs_shape.at(a.rhs_spec.at(0)) / groups(a);
  return {a.rhs_shape.at(a.rhs_spec.at(1)), std::max<int64_t>(1, features), groups(a),
          product(spatial(a.lhs_shape, a.lhs_spec)), a.lhs_shape.at(a.lhs_spec.at(0))};
}

Neighbours::Neighbours(const std::vector<double>& weights, size_t leading, double limit)
    : weights_(weights), leading_(leading), limit_(limit) {
  if (leading < 1 || leading >= weights.size()) {
    throw std::invalid_argument("leading: must be some of the sizes, and not all");
  }
}

Neighbours::Halves Neighbours::halves(const Sizes& sizes) const {
  if (sizes.size() != weights_.size()) throw std::invalid_argument("sizes: one for each weight");
  const auto middle = sizes.begin() + static_cast<std::ptrdiff_t>(leading_);
  Halves h{{sizes.begin(), middle}, {middle, sizes.end()}, {}, {}};
  h.first_point.reserve(sizes.size());
  h.rest_point.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    // Of 0, in empty arrays, there is no logarithm.
    const double at = std::log2(static_cast<double>(std::max<int64_t>(1, sizes[i]))) * weights_[i];
    (i < leading_ ? h.first_point : h.rest_point).push_back(at);
  }
  return h;
}

size_t Neighbours::Places::at(const Sizes& sizes, const Point& point) {
  const auto [found, is_new] = known.emplace(sizes, line.size());
  if (is_new) {
    const std::pair<double, size_t> entry{point[0], found->second};
    order.insert(std::upper_bound(order.begin(), order.end(), entry), entry);
    points.insert(points.end(), point.begin(), point.end());
    line.push_back(
        lines.emplace(Sizes(sizes.begin() + 1, sizes.end()), lines.size()).first->second);
  }
  return found->second;
}

void Neighbours::add(const std::string& kind, const Sizes& sizes) {
  const Halves h = halves(sizes);
  Kind& k = kinds_[kind];
  const size_t first = k.firsts.at(h.first, h.first_point);
  k.rests.resize(k.firsts.line.size());
  k.things.resize(k.firsts.line.size());
  const size_t rest = k.rests[first].at(h.rest, h.rest_point);
  k.things[first].resize(k.rests[first].line.size());
  k.things[first][rest].push_back(count_++);
}

// Of equal distances the first line's, and in a line the larger one's.
bool Neighbours::Near::operator<(const Near& other) const {
  return std::tie(distance, line, smaller, place) <
         std::tie(other.distance, other.line, other.smaller, other.place);
}

std::vector<Neighbours::Near> Neighbours::Places::nearest(const Point& point, double limit) const {
  std::vector<Near> found;
  found.reserve(kMost + 1);
  // From the middle outwards, always the side that is nearer in the first size: where this alone is
  // too far away, so is whatever comes after.
  const size_t dimensions = point.size();
  auto above = std::lower_bound(order.begin(), order.end(), std::pair<double, size_t>{point[0], 0});
  auto below = above;
  const double none = std::numeric_limits<double>::infinity();
  while (true) {
    const double up = above == order.end() ? none : above->first - point[0];
    const double down = below == order.begin() ? none : point[0] - std::prev(below)->first;
    const bool smaller = down < up;
    const double first = smaller ? down : up;
    if (first > limit || first == none) break;
    const size_t place = smaller ? (--below)->second : (above++)->second;
    const double* there = points.data() + place * dimensions;
    double away = 0;
    for (size_t d = 1; d < dimensions; ++d) away += std::abs(there[d] - point[d]);
    const double distance = smaller ? away + point[0] - there[0] : away + there[0] - point[0];
    if (distance > limit) continue;
    const Near near{distance, line[place], smaller, place};
    found.insert(std::upper_bound(found.begin(), found.end(), near), near);
    if (found.size() > kMost) found.pop_back();
    if (found.size() == kMost) limit = found.back().distance;
  }
  return found;
}

std::vector<int64_t> Neighbours::nearest(const std::string& kind, const Sizes& sizes) const {
  std::vector<int64_t> result;
  const auto of_kind = kinds_.find(kind);
  if (of_kind == kinds_.end()) return result;
  const Kind& k = of_kind->second;
  const Halves h = halves(sizes);
  const auto take = [&](size_t first, double limit) {
    for (const Near& near : k.rests[first].nearest(h.rest_point, limit)) {
      const auto& found = k.things[first][near.place];
      result.insert(result.end(), found.begin(), found.end());
    }
  };
  const auto alike = k.firsts.known.find(h.first);
  if (alike != k.firsts.known.end()) take(alike->second, limit_);
  if (!result.empty()) return result;
  for (const Near& near : k.firsts.nearest(h.first_point, limit_)) {
    take(near.place, limit_ - near.distance);
    if (result.size() >= kMost) break;
  }
  return result;
}

}  // namespace jaxwin
