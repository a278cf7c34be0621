// CPU kernels for XLA: convolutions, forward and backward, and V-trace. impala_jax/kernels/cpu.py documents the shapes.
//
// All arrays are float32. Images are NHWC, filters are [height, width, channels, filters], and the number of filters is
// a multiple of 16. Each thread processes one image at a time, so that the image and its gradients stay in the core's
// cache. Images are distributed over XLA's thread pool. The order of summation of an output does not depend on the
// batch size or the number of threads.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A Vector is one register, because GCC keeps larger ones in memory. There are 32 registers of 512 bits, or 16 smaller
// ones; the number of accumulators leaves enough of them for the factors.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24;
#else
constexpr int kLanes = 8, kAccumulators = 12;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename V, typename T>
inline V Load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void Store(T* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// Calls work(i) for each i < count, on the calling thread and on idle threads of the pool. The caller never waits for a
// task that has not started, so with a blocked pool it does all the work itself.
template <typename Work>
void ForEach(ffi::ThreadPool& threads, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto shared = std::make_shared<Shared>();
  auto run = [shared, count, &work] {  // Tasks may outlive `work`, but then no index is left.
    int64_t mine = 0;
    for (int64_t i; (i = shared->next++) < count; ++mine) work(i);
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    if ((shared->done += mine) == count) shared->all_done.notify_one();
  };
  for (int64_t i = 1; i < std::min(count, threads.num_threads()); ++i) threads.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}

// Thread-local buffers, reused between calls: 0 for a padded image, 1 for outputs before pooling or their gradient.
float* Scratch(int which, size_t floats) {
  thread_local std::array<std::vector<float>, 2> buffers;
  if (buffers[which].size() < floats) buffers[which].resize(floats);
  return buffers[which].data();
}

struct Convolution {
  int64_t images, height, width, channels;
  int64_t size_y, size_x, filters, stride;
  int64_t top, left;         // Padding before the first row and column.
  int64_t rows, columns;     // Size of the convolution's output, before pooling.
  bool relu;                 // Whether to apply a ReLU to the input.
  bool pool;                 // Whether to max-pool: 3 x 3, stride 2, padded like XLA's SAME.

  int64_t image_size() const { return height * width * channels; }
  int64_t kernel_size() const { return size_y * size_x * channels * filters; }
  int64_t output_size() const { return rows * columns * filters; }
  int64_t pooled_rows() const { return (rows + 1) / 2; }
  int64_t pooled_columns() const { return (columns + 1) / 2; }
  int64_t pooled_size() const { return pooled_rows() * pooled_columns() * filters; }
  int64_t result_size() const { return pool ? pooled_size() : output_size(); }
};

// The part of an image that the filters cover, with its padding.
struct Rows {
  const float* data;
  int64_t stride;
};

Rows Padded(const float* image, int64_t height, int64_t width, int64_t channels, int64_t top, int64_t left,
            int64_t padded_height, int64_t padded_width, bool relu) {
  if (top == 0 && left == 0 && padded_height <= height && padded_width <= width && !relu) {
    return {image, width * channels};
  }
  const int64_t stride = padded_width * channels;
  float* padded = Scratch(0, padded_height * stride);
  const int64_t before = left * channels, used = std::min(width, padded_width - left) * channels;
  for (int64_t y = 0; y < padded_height; ++y) {
    float* to = padded + y * stride;
    if (y < top || y >= top + height) {
      std::fill(to, to + stride, 0.0f);
      continue;
    }
    const float* from = image + (y - top) * width * channels;
    std::fill(to, to + before, 0.0f);
    if (relu) {
      for (int64_t i = 0; i < used; ++i) to[before + i] = from[i] < 0.0f ? 0.0f : from[i];  // Preserves NaN.
    } else {
      std::memcpy(to + before, from, used * sizeof(float));
    }
    std::fill(to + before + used, to + stride, 0.0f);
  }
  return {padded, stride};
}

Rows PaddedImage(const Convolution& c, const float* image) {
  return Padded(image, c.height, c.width, c.channels, c.top, c.left, (c.rows - 1) * c.stride + c.size_y,
                (c.columns - 1) * c.stride + c.size_x, c.relu);
}

// A row of outputs. Each output is the sum, over `size_y` rows of `run` contiguous inputs, of input times weight, for
// each of `filters`. The inputs of neighbouring outputs are `step` apart, and the outputs are written `out_step` apart.
struct RowOfOutputs {
  const float* in;
  int64_t in_stride, step, size_y, run;
  const float* weights;
  int64_t filters, columns;
  const float* bias;  // May be null.
  float* out;
  int64_t out_step;
  const float* gate;  // May be null. Same layout as `out`; outputs are zero where it is not positive.
};

template <int kPixels, int kVectors>
void Tile(const RowOfOutputs& r, int64_t x, int64_t f) {
  Vector sums[kPixels][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Vector start = r.bias ? Load<Vector>(r.bias + f + v * kLanes) : Vector{};
#pragma GCC unroll 32
    for (int p = 0; p < kPixels; ++p) sums[p][v] = start;
  }
  const float* weights = r.weights + f;
  for (int64_t y = 0; y < r.size_y; ++y) {
    const float* in = r.in + y * r.in_stride + x * r.step;
    for (int64_t i = 0; i < r.run; ++i, ++in, weights += r.filters) {
      Vector weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) weight[v] = Load<Vector>(weights + v * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < kPixels; ++p) {
        const float value = in[p * r.step];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[p][v] += value * weight[v];
      }
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (x + p) * r.out_step + f + v * kLanes;
      Vector sum = sums[p][v];
      if (r.gate) sum = Load<Vector>(r.gate + at) > 0.0f ? sum : Vector{};
      Store(r.out + at, sum);
    }
  }
}

using TileFunction = void (*)(const RowOfOutputs&, int64_t, int64_t);

template <int kVectors, int... kPixels>
constexpr std::array<TileFunction, sizeof...(kPixels)> Tiles(std::integer_sequence<int, kPixels...>) {
  return {Tile<kPixels + 1, kVectors>...};
}

template <int kVectors>
void Outputs(const RowOfOutputs& r) {
  constexpr int kMost = std::min(kAccumulators / kVectors, 14);
  static constexpr auto kTiles = Tiles<kVectors>(std::make_integer_sequence<int, kMost>());
  // The smallest number of tiles, all of the same width. The last one overlaps the previous and rewrites some outputs.
  const int64_t tiles = (r.columns + kMost - 1) / kMost, width = (r.columns + tiles - 1) / tiles;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t x = std::min(tile * width, r.columns - width);
    for (int64_t f = 0; f < r.filters; f += kVectors * kLanes) kTiles[width - 1](r, x, f);
  }
}

void Outputs(const RowOfOutputs& r) {
  if (r.filters % (2 * kLanes) == 0) {
    Outputs<2>(r);
  } else {
    Outputs<1>(r);
  }
}

// Calls visit(output, each_pixel) for each window and kLanes filters; each_pixel(at) calls at(index in window, input).
template <typename Visit>
void EachWindow(const Convolution& c, const Visit& visit) {
  // XLA's SAME: an even number of rows is padded with one row at the end, an odd number with one at each end.
  const int64_t top = c.rows % 2, left = c.columns % 2;
  for (int64_t y = 0; y < c.pooled_rows(); ++y) {
    for (int64_t x = 0; x < c.pooled_columns(); ++x) {
      for (int64_t f = 0; f < c.filters; f += kLanes) {
        visit((y * c.pooled_columns() + x) * c.filters + f, [&](const auto& at) {
          for (int dy = 0; dy < 3; ++dy) {
            const int64_t in_y = 2 * y - top + dy;
            if (in_y < 0 || in_y >= c.rows) continue;
            for (int dx = 0; dx < 3; ++dx) {
              const int64_t in_x = 2 * x - left + dx;
              if (in_x >= 0 && in_x < c.columns) at(3 * dy + dx, (in_y * c.columns + in_x) * c.filters + f);
            }
          }
        });
      }
    }
  }
}

// Computes the maximum of each window and its index among the nine pixels: the first of equal ones, but any NaN wins.
void Pool(const Convolution& c, const float* in, float* out, uint8_t* winners) {
  EachWindow(c, [&](int64_t to, const auto& each_pixel) {
    Vector best = Vector{} - __builtin_inff();
    Integers winner = Integers{};
    each_pixel([&](int which, int64_t from) {
      const Vector value = Load<Vector>(in + from);
      const Integers better = (value > best) | (value != value);
      best = better ? value : best;
      winner = better ? Integers{} + which : winner;
    });
    Store(out + to, best);
    Store(winners + to, __builtin_convertvector(winner, Bytes));
  });
}

// Propagates gradients to the pixels with the maxima.
void Unpool(const Convolution& c, const float* gradient, const uint8_t* winners, float* out) {
  std::fill(out, out + c.output_size(), 0.0f);
  EachWindow(c, [&](int64_t from, const auto& each_pixel) {
    const Vector value = Load<Vector>(gradient + from);
    const Integers winner = __builtin_convertvector(Load<Bytes>(winners + from), Integers);
    each_pixel([&](int which, int64_t to) {
      Store(out + to, Load<Vector>(out + to) + (winner == which ? value : Vector{}));
    });
  });
}

// Returns the gradient of the convolution's output before pooling, for image n.
const float* OutputGradient(const Convolution& c, const float* gradient, const uint8_t* winners, int64_t n) {
  gradient += n * c.result_size();
  if (!c.pool) return gradient;
  float* out = Scratch(1, c.output_size());
  Unpool(c, gradient, winners + n * c.result_size(), out);
  return out;
}

void Forward(const Convolution& c, ffi::ThreadPool& threads, const float* images, const float* kernel, const float* bias,
             float* results, uint8_t* winners) {
  ForEach(threads, c.images, [&](int64_t n) {
    const Rows in = PaddedImage(c, images + n * c.image_size());
    float* result = results + n * c.result_size();
    float* out = c.pool ? Scratch(1, c.output_size()) : result;
    for (int64_t y = 0; y < c.rows; ++y) {
      Outputs({in.data + y * c.stride * in.stride, in.stride, c.stride * c.channels, c.size_y, c.size_x * c.channels,
               kernel, c.filters, c.columns, bias, out + y * c.columns * c.filters, c.filters, nullptr});
    }
    if (c.pool) Pool(c, out, result, winners + n * c.result_size());
  });
}

// Gradients of pixels that are `stride` apart use the same weights. For each of the stride x stride phases, this is a
// convolution of the gradients with every stride-th weight, in reverse order.
void ImageGradient(const Convolution& c, ffi::ThreadPool& threads, const float* images, const float* kernel,
                   const float* gradients, const uint8_t* winners, float* results) {
  struct Phase {
    int64_t y, x, size_y, size_x;
    std::vector<float> weights;  // [size_y, size_x, filters, channels]
  };
  std::vector<Phase> phases;
  const int64_t s = c.stride;
  for (int64_t y = 0; y < s; ++y) {
    for (int64_t x = 0; x < s; ++x) {
      Phase phase{y, x, (c.size_y - y + s - 1) / s, (c.size_x - x + s - 1) / s, {}};
      for (int64_t a = phase.size_y - 1; a >= 0; --a) {
        for (int64_t b = phase.size_x - 1; b >= 0; --b) {
          const float* from = kernel + ((y + a * s) * c.size_x + x + b * s) * c.channels * c.filters;
          for (int64_t f = 0; f < c.filters; ++f) {
            for (int64_t i = 0; i < c.channels; ++i) phase.weights.push_back(from[i * c.filters + f]);
          }
        }
      }
      phases.push_back(std::move(phase));
    }
  }
  const int64_t border_y = (c.size_y + s - 1) / s - 1, border_x = (c.size_x + s - 1) / s - 1;
  const int64_t last_y = (c.height - 1 + c.top) / s, last_x = (c.width - 1 + c.left) / s;
  ForEach(threads, c.images, [&](int64_t n) {
    const Rows in = Padded(OutputGradient(c, gradients, winners, n), c.rows, c.columns, c.filters, border_y, border_x,
                           last_y + 1 + border_y, last_x + 1 + border_x, false);
    const float* gate = c.relu ? images + n * c.image_size() : nullptr;
    float* out = results + n * c.image_size();
    for (const Phase& phase : phases) {
      const int64_t first_y = (c.top - phase.y + s - 1) / s, first_x = (c.left - phase.x + s - 1) / s;
      for (int64_t y = std::max<int64_t>(first_y, 0); y * s + phase.y - c.top < c.height; ++y) {
        const int64_t x = std::max<int64_t>(first_x, 0);
        // Not (... - phase.x) / s + 1: C++ rounds negative quotients towards zero, which would add a column.
        const int64_t columns = (c.width - 1 - phase.x + c.left + s) / s - x;
        if (columns <= 0) continue;
        const int64_t at = ((y * s + phase.y - c.top) * c.width + x * s + phase.x - c.left) * c.channels;
        const float* row = in.data + (y + border_y - (phase.size_y - 1)) * in.stride +
                           (x + border_x - (phase.size_x - 1)) * c.filters;
        Outputs({row, in.stride, c.filters, phase.size_y, phase.size_x * c.filters, phase.weights.data(), c.channels,
                 columns, nullptr, out + at, s * c.channels, gate ? gate + at : nullptr});
      }
    }
  });
}

// Adds the products of inputs, from `offset` on, and gradients, summed over all outputs, to `sums`, [kInputs, filters].
template <int kInputs>
void Products(const Convolution& c, const Rows& rows, int64_t offset, const float* gradient, float* sums) {
  Vector sum[kInputs];
#pragma GCC unroll 32
  for (int i = 0; i < kInputs; ++i) sum[i] = Load<Vector>(sums + i * c.filters);
  const int64_t step = c.stride * c.channels;
  for (int64_t y = 0; y < c.rows; ++y) {
    const float* in = rows.data + offset + y * c.stride * rows.stride;
    for (int64_t x = 0; x < c.columns; ++x, in += step, gradient += c.filters) {
      const Vector g = Load<Vector>(gradient);
#pragma GCC unroll 32
      for (int i = 0; i < kInputs; ++i) sum[i] += in[i] * g;
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kInputs; ++i) Store(sums + i * c.filters, sum[i]);
}

using ProductsFunction = void (*)(const Convolution&, const Rows&, int64_t, const float*, float*);

template <int... kInputs>
constexpr std::array<ProductsFunction, sizeof...(kInputs)> AllProducts(std::integer_sequence<int, kInputs...>) {
  return {Products<kInputs + 1>...};
}

// Computes the gradients of kernel and bias. They are summed within parts of the batch and then over the parts, whose
// number depends on the batch size and not on the number of threads.
void KernelGradient(const Convolution& c, ffi::ThreadPool& threads, const float* images, const float* gradients,
                    const uint8_t* winners, float* kernel, float* bias) {
  constexpr int kMost = std::min(kAccumulators, 16);
  static constexpr auto kProducts = AllProducts(std::make_integer_sequence<int, kMost>());
  const int64_t parts = std::min<int64_t>(c.images, 32), size = c.kernel_size() + c.filters;
  std::vector<float> sums(parts * size, 0.0f);
  ForEach(threads, parts, [&](int64_t part) {
    float* of_kernel = sums.data() + part * size;
    float* of_bias = of_kernel + c.kernel_size();
    for (int64_t n = part * c.images / parts; n < (part + 1) * c.images / parts; ++n) {
      const Rows in = PaddedImage(c, images + n * c.image_size());
      const float* gradient = OutputGradient(c, gradients, winners, n);
      const int64_t run = c.size_x * c.channels;
      const int64_t blocks = (run + kMost - 1) / kMost;
      for (int64_t f = 0; f < c.filters; f += kLanes) {
        for (int64_t y = 0; y < c.size_y; ++y) {
          for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * run / blocks, end = (block + 1) * run / blocks;
            kProducts[end - first - 1](c, in, y * in.stride + first, gradient + f,
                                       of_kernel + (y * run + first) * c.filters + f);
          }
        }
        Vector sum = Load<Vector>(of_bias + f);
        for (int64_t i = 0; i < c.rows * c.columns; ++i) sum += Load<Vector>(gradient + i * c.filters + f);
        Store(of_bias + f, sum);
      }
    }
  });
  std::fill(kernel, kernel + c.kernel_size(), 0.0f);
  std::fill(bias, bias + c.filters, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    const float* from = sums.data() + part * size;
    for (int64_t i = 0; i < c.kernel_size(); ++i) kernel[i] += from[i];
    for (int64_t i = 0; i < c.filters; ++i) bias[i] += from[c.kernel_size() + i];
  }
}

// Computes exp with an error of about two units in the last place; exact at 0 and minus infinity. Cephes' polynomial.
inline Vector Exp(Vector x) {
  x = x > 89.0f ? Vector{} + 89.0f : x;  // exp is infinity from 88.73 on.
  x = x < -104.0f ? Vector{} - 104.0f : x;  // exp is 0 below -103.98.
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: adding it removes the fraction.
  const Vector n = (x * 1.44269504f + kRound) - kRound;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = Vector{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
  y = y * r * r + r + 1.0f;
  // Multiplies by 2^n in two steps, because n may exceed the exponent range of a float.
  const Integers half = __builtin_convertvector(n, Integers) >> 1, rest = __builtin_convertvector(n, Integers) - half;
  return y * (Vector)((half + 127) << 23) * (Vector)((rest + 127) << 23);
}

struct VTrace {
  int64_t steps, batch;
  const float *log_rhos, *discounts, *rewards, *values, *bootstrap;
  float rho_bar, c_bar, pg_rho_bar, lambda;
  float *vs, *advantages;
};

// Processes `count` <= kLanes columns of [T, B], from the last step to the first; see impala_jax/vtrace.py.
void VTraceColumns(const VTrace& v, int64_t first, int64_t count) {
  const auto load = [&](const float* from) {
    if (count == kLanes) return Load<Vector>(from);
    Vector some = {};
    std::memcpy(&some, from, count * sizeof(float));
    return some;
  };
  const auto store = [&](float* to, Vector some) {
    if (count == kLanes) return Store(to, some);
    std::memcpy(to, &some, count * sizeof(float));
  };
  const auto clip = [](Vector ratio, float bar) { return ratio > bar ? Vector{} + bar : ratio; };
  Vector next_value = load(v.bootstrap + first), next_target = next_value, correction = {};
  for (int64_t at = (v.steps - 1) * v.batch + first; at >= 0; at -= v.batch) {
    const Vector ratio = Exp(load(v.log_rhos + at)), discount = load(v.discounts + at), value = load(v.values + at);
    const Vector reward = load(v.rewards + at);
    const Vector delta = clip(ratio, v.rho_bar) * (reward + discount * next_value - value);
    correction = delta + discount * (v.lambda * clip(ratio, v.c_bar)) * correction;
    const Vector target = value + correction;
    store(v.vs + at, target);
    store(v.advantages + at, clip(ratio, v.pg_rho_bar) * (reward + discount * next_target - value));
    next_value = value;
    next_target = target;
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Winners = ffi::Buffer<ffi::U8>;
template <typename T>
using Result = ffi::Result<T>;

template <typename Dimensions>
Convolution Describe(const Dimensions& images, const Dimensions& kernel, int64_t stride, int64_t top, int64_t left,
                     int64_t rows, int64_t columns, bool relu, bool pool) {
  return {images[0], images[1], images[2], images[3], kernel[0], kernel[1], kernel[3], stride,
          top,       left,      rows,      columns,   relu,      pool};
}

ffi::Error ForwardCall(ffi::ThreadPool threads, Floats images, Floats kernel, Floats bias, Result<Floats> out,
                       Result<Winners> winners, int64_t stride, int64_t top, int64_t left, int64_t rows,
                       int64_t columns, bool relu, bool pool) {
  Forward(Describe(images.dimensions(), kernel.dimensions(), stride, top, left, rows, columns, relu, pool), threads,
          images.typed_data(), kernel.typed_data(), bias.typed_data(), out->typed_data(), winners->typed_data());
  return ffi::Error::Success();
}

ffi::Error KernelGradientCall(ffi::ThreadPool threads, Floats images, Floats gradients, Winners winners,
                              Result<Floats> kernel, Result<Floats> bias, int64_t stride, int64_t top, int64_t left,
                              int64_t rows, int64_t columns, bool relu, bool pool) {
  KernelGradient(Describe(images.dimensions(), kernel->dimensions(), stride, top, left, rows, columns, relu, pool),
                 threads, images.typed_data(), gradients.typed_data(), winners.typed_data(), kernel->typed_data(),
                 bias->typed_data());
  return ffi::Error::Success();
}

ffi::Error ImageGradientCall(ffi::ThreadPool threads, Floats images, Floats kernel, Floats gradients, Winners winners,
                             Result<Floats> out, int64_t stride, int64_t top, int64_t left, int64_t rows,
                             int64_t columns, bool relu, bool pool) {
  ImageGradient(Describe(images.dimensions(), kernel.dimensions(), stride, top, left, rows, columns, relu, pool),
                threads, images.typed_data(), kernel.typed_data(), gradients.typed_data(), winners.typed_data(),
                out->typed_data());
  return ffi::Error::Success();
}

ffi::Error VTraceCall(Floats log_rhos, Floats discounts, Floats rewards, Floats values, Floats bootstrap,
                      Result<Floats> vs, Result<Floats> advantages, float rho_bar, float c_bar, float pg_rho_bar,
                      float lambda) {
  const int64_t steps = log_rhos.dimensions()[0], batch = log_rhos.dimensions()[1];
  const VTrace v{steps,
                 batch,
                 log_rhos.typed_data(),
                 discounts.typed_data(),
                 rewards.typed_data(),
                 values.typed_data(),
                 bootstrap.typed_data(),
                 rho_bar,
                 c_bar,
                 pg_rho_bar,
                 lambda,
                 vs->typed_data(),
                 advantages->typed_data()};
  for (int64_t i = 0; i < batch; i += kLanes) VTraceColumns(v, i, std::min<int64_t>(kLanes, batch - i));
  return ffi::Error::Success();
}

template <typename Binding>
auto WithAttributes(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("stride")
      .template Attr<int64_t>("top")
      .template Attr<int64_t>("left")
      .template Attr<int64_t>("rows")
      .template Attr<int64_t>("columns")
      .template Attr<bool>("relu")
      .template Attr<bool>("pool");
}

}  // namespace

// Returns the SHA-256 of this file.
extern "C" const char* impala_source() { return IMPALA_SOURCE; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(impala_conv, ForwardCall,
                              WithAttributes(ffi::Ffi::Bind()
                                                 .Ctx<ffi::ThreadPool>()
                                                 .Arg<Floats>()
                                                 .Arg<Floats>()
                                                 .Arg<Floats>()
                                                 .Ret<Floats>()
                                                 .Ret<Winners>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(impala_conv_kernel_gradient, KernelGradientCall,
                              WithAttributes(ffi::Ffi::Bind()
                                                 .Ctx<ffi::ThreadPool>()
                                                 .Arg<Floats>()
                                                 .Arg<Floats>()
                                                 .Arg<Winners>()
                                                 .Ret<Floats>()
                                                 .Ret<Floats>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(impala_conv_image_gradient, ImageGradientCall,
                              WithAttributes(ffi::Ffi::Bind()
                                                 .Ctx<ffi::ThreadPool>()
                                                 .Arg<Floats>()
                                                 .Arg<Floats>()
                                                 .Arg<Floats>()
                                                 .Arg<Winners>()
                                                 .Ret<Floats>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(impala_vtrace, VTraceCall,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("rho_bar")
                                  .Attr<float>("c_bar")
                                  .Attr<float>("pg_rho_bar")
                                  .Attr<float>("lambda"));
