// How the work of a call is spread over threads.
//
// A call is cut into units, normalized each by itself (some channels, a sample, some
// rows), and a unit into chunks. The cut comes from the problem alone, never from the
// number of threads, and partial sums are merged in the order of the chunks: so the
// answer is the same to the last bit on any number of threads.
#ifndef NORMD_KERNELS_CPU_SCHEDULE_H_
#define NORMD_KERNELS_CPU_SCHEDULE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stop_token>

#include "kernels/backend.h"
#include "kernels/cpu/cache.h"
#include "kernels/cpu/call.h"

namespace normd::cpu {

// A call whose tensors are smaller than this is done by the thread that asked; threads that
// sleep are not woken before kBytesWorthWaking: it would take longer than the work.
inline constexpr int64_t kBytesWorthThreads = int64_t{1} << 18;
inline constexpr int64_t kBytesWorthWaking = int64_t{1} << 22;

struct Cut {
  int64_t units;
  int64_t chunks;  // of each unit
  int64_t bytes;   // of all tensors
};

// Job:
//   bool reduces()                   whether there is a first step at all
//   bool applies()                   whether there is a second
//   void Reduce(unit, chunk)         partial sums of a chunk
//   void Finish(unit)                from all of its partial sums to coefficients
//   void Apply(unit, chunk)          writes a chunk
template <class Job>
Outcome Run(Job& job, const Cut& cut, const Context& context) {
  SerialExecutor serial;
  Executor& executor = cut.bytes < kBytesWorthThreads ? serial : context.executor;
  const Help help = cut.bytes < kBytesWorthWaking ? Help::kAwake : Help::kAll;
  std::atomic<bool> stopped = false;
  const auto go_on = [&] {
    if (!context.stop.stop_requested()) return true;
    stopped.store(true, std::memory_order_relaxed);
    return false;
  };
  const auto reduce = [&](int64_t unit, int64_t chunk) {
    if (go_on()) job.Reduce(unit, chunk);
  };
  const auto apply = [&](int64_t unit, int64_t chunk) {
    if (!go_on()) return;
    job.Apply(unit, chunk);
    if (cut.bytes > LargestCachedBytes()) FlushStreams();
  };
  // Last chunk first: that is what a cache still holds of a unit larger than it.
  const Walk walk = job.reduces() ? Walk::kBackward : Walk::kForward;

  if (executor.concurrency() == 1 || cut.chunks == 1 || cut.units >= 4 * executor.concurrency()) {
    // A thread does a unit from beginning to end while it lies in its cache.
    const auto whole_unit = [&](int64_t unit) {
      if (job.reduces()) {
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) reduce(unit, chunk);
      }
      if (stopped.load(std::memory_order_relaxed)) return;
      job.Finish(unit);
      if (job.applies()) {
        serial.ParallelFor(
            cut.chunks, [&](int64_t chunk) { apply(unit, chunk); }, walk);
      }
    };
    executor.ParallelFor(cut.units, whole_unit, Walk::kForward, help);
  } else {
    // Few large units: all threads work on one.
    for (int64_t unit = 0; unit < cut.units; ++unit) {
      if (job.reduces()) {
        executor.ParallelFor(
            cut.chunks, [&](int64_t chunk) { reduce(unit, chunk); }, Walk::kForward, help);
      }
      if (stopped.load(std::memory_order_relaxed)) break;
      job.Finish(unit);
      if (job.applies()) {
        executor.ParallelFor(
            cut.chunks, [&](int64_t chunk) { apply(unit, chunk); }, walk, help);
      }
    }
  }
  return stopped.load() ? Outcome::kStopped : Outcome::kOk;
}

// Calls apply(part) for each of `parts` that need nothing summed first. `bytes`: of all
// tensors.
template <class ApplyPart>
Outcome RunParts(int64_t parts, int64_t bytes, const Context& context, const ApplyPart& apply) {
  struct Job {
    bool reduces() const { return false; }
    bool applies() const { return true; }
    void Reduce(int64_t, int64_t) {}
    void Finish(int64_t) {}
    void Apply(int64_t part, int64_t) { apply(part); }
    const ApplyPart& apply;
  };
  Job job{apply};
  return Run(job, {parts, 1, bytes}, context);
}

// Units that a thread takes one after the other, without a break.
struct Span {
  int64_t begin;
  int64_t end;
};

// Calls apply(span) for spans that together are all units, and that end early where the caller
// asked to stop. `bytes`: of all tensors.
template <class ApplySpan>
Outcome RunSpans(int64_t units, int64_t bytes, const Context& context, const ApplySpan& apply) {
  const int64_t threads = bytes < kBytesWorthThreads ? 1 : context.executor.concurrency();
  const int64_t spans = threads == 1 ? 1 : std::min(units, 4 * threads);
  const Outcome outcome = RunParts(spans, bytes, context, [&](int64_t i) {
    apply(Span{units * i / spans, units * (i + 1) / spans});
  });
  return context.stop.stop_requested() ? Outcome::kStopped : outcome;
}

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_SCHEDULE_H_
