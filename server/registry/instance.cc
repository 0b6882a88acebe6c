#include "server/registry/instance.h"

#include <algorithm>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/clock.h"
#include "server/error/error.h"

namespace normd {
namespace {

absl::Status VersionMismatch(uint64_t expected, uint64_t current) {
  v1::ErrorDetail detail;
  detail.set_field("expected_version");
  detail.set_value(absl::StrCat(expected));
  detail.set_allowed(absl::StrCat(current));
  detail.set_current_version(current);
  auto status = absl::AbortedError(absl::StrCat("expected_version is ", expected,
                                                ", but the instance is at version ", current,
                                                "; nothing was changed"));
  SetDetail(status, detail);
  return status;
}

absl::Status OtherMethod() {
  return InvalidField("request_id", "the id of a call of another method",
                      "a new UUID for each call, repeated only by its own retries");
}

}  // namespace

std::string NewUid() {
  absl::BitGen bits;
  const auto high = absl::Uniform<uint64_t>(bits);
  const auto low = absl::Uniform<uint64_t>(bits);
  return absl::StrFormat("%08x-%04x-4%03x-%04x-%012x", high >> 32, (high >> 16) & 0xffff,
                         high & 0xfff, ((low >> 48) & 0x3fff) | 0x8000, low & 0xffffffffffff);
}

absl::Status InstanceDeleted() { return absl::NotFoundError("the instance was deleted"); }

absl::Status NoLongerKnown(const std::string& request_id, const AppliedRequest& applied) {
  v1::ErrorDetail detail;
  detail.set_field("request_id");
  detail.set_value(request_id);
  detail.set_allowed("repeated while what its output was computed from is the same");
  detail.set_applied_version(applied.version);
  auto status = absl::FailedPreconditionError(
      absl::StrCat("the call of this request_id was applied and made version ", applied.version,
                   "; its output can no longer be told, for what it was computed from has "
                   "changed since"));
  SetDetail(status, detail);
  return status;
}

std::shared_ptr<Instance> Instance::Restored(Persister* persister, StoredInstance stored) {
  auto instance = std::make_shared<Instance>(persister, std::move(stored));
  absl::MutexLock lock(&instance->mutex_);
  instance->published_ = instance->tip_;
  instance->requests_.NoneAfter(SteadyNow());
  return instance;
}

Snapshot Instance::published() const {
  absl::ReaderMutexLock lock(&mutex_);
  return removed_ ? nullptr : published_;
}

Snapshot Instance::tip() const {
  absl::ReaderMutexLock lock(&mutex_);
  return removing_ || removed_ || published_ == nullptr ? nullptr : tip_;
}

std::optional<AppliedRequest> Instance::Applied(std::optional<absl::uint128> request_id) const {
  if (!request_id.has_value()) return std::nullopt;
  absl::ReaderMutexLock lock(&mutex_);
  return requests_.Find(*request_id, SteadyNow());
}

StoredInstance Instance::ForCheckpoint() const {
  absl::ReaderMutexLock lock(&mutex_);
  if (removed_ || published_ == nullptr) return {};
  StoredInstance stored{published_, requests_.entries()};
  std::erase_if(stored.requests, [&](const AppliedRequest& request) {
    return request.version > published_->version;
  });
  return stored;
}

void Instance::Create(absl::AnyInvocable<void(absl::Status)> done) {
  mutex_.Lock();
  const Changed answer{.version = tip_->version, .state = tip_};
  Submit(
      {.name = tip_->identity->name,
       .previous_version = 0,
       .state = tip_,
       .requests = requests_.entries(),
       .replace_requests = true},
      answer,
      [done = std::move(done)](absl::StatusOr<Changed> changed) mutable { done(changed.status()); },
      /*removal=*/false);
}

bool Instance::Change(const ChangeOptions& options,
                      absl::FunctionRef<absl::StatusOr<Edited>(InstanceState& next)> edit,
                      ChangeDone done) {
  mutex_.Lock();
  const auto answer_now = [&](absl::StatusOr<Changed> answer) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    mutex_.Unlock();
    done(std::move(answer));
    return true;
  };
  // Answers with a version that may still be pending.
  const auto answer_when_published = [&](Changed answer) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (answer.version <= published_->version) return answer_now(std::move(answer));
    const uint64_t version = answer.version;
    waiters_.push_back({version, std::move(answer), std::move(done)});
    mutex_.Unlock();
    return true;
  };

  if (removing_ || removed_ || published_ == nullptr) return answer_now(InstanceDeleted());
  const absl::Time now = SteadyNow();
  if (options.request_id.has_value()) {
    if (const auto applied = requests_.Find(*options.request_id, now)) {
      if (!SameCall(applied->method, options.method)) return answer_now(OtherMethod());
      return answer_when_published({.version = applied->version,
                                    .replayed = true,
                                    .method = applied->method,
                                    .num_batches_tracked = applied->num_batches_tracked,
                                    .state = tip_});
    }
  }
  if (options.expected_version.has_value() && *options.expected_version != tip_->version) {
    return answer_now(VersionMismatch(*options.expected_version, tip_->version));
  }

  InstanceState next = *tip_;
  const absl::StatusOr<Edited> edited = edit(next);
  if (!edited.ok()) return answer_now(edited.status());
  if (*edited == Edited::kStale) {
    mutex_.Unlock();
    return false;
  }
  if (*edited == Edited::kUnchanged) {
    return answer_when_published({.version = tip_->version,
                                  .method = options.method,
                                  .num_batches_tracked = tip_->num_batches_tracked,
                                  .state = tip_});
  }

  const uint64_t previous_version = tip_->version;
  const Method method = *edited == Edited::kReset ? Method::kResetOptimizer : options.method;
  next.version = previous_version + 1;
  if (next.weight.data() != tip_->weight.data() || next.bias.data() != tip_->bias.data()) {
    next.parameters_version = next.version;
  }
  next.update_time = absl::Now();
  tip_ = std::make_shared<const InstanceState>(std::move(next));
  normd::Change change{
      .name = tip_->identity->name, .previous_version = previous_version, .state = tip_};
  if (options.request_id.has_value()) {
    change.requests.push_back({.id = *options.request_id,
                               .method = method,
                               .version = tip_->version,
                               .num_batches_tracked = tip_->num_batches_tracked,
                               .time = now});
    requests_.Add(change.requests.back());
  }
  Submit(std::move(change),
         {.version = tip_->version,
          .method = method,
          .num_batches_tracked = tip_->num_batches_tracked,
          .state = tip_},
         std::move(done), /*removal=*/false);
  return true;
}

void Instance::Replace(const StoredInstance& loaded, ChangeDone done) {
  mutex_.Lock();
  if (removing_ || removed_ || published_ == nullptr) {
    mutex_.Unlock();
    return done(InstanceDeleted());
  }
  const uint64_t previous_version = tip_->version;
  InstanceState next = *loaded.state;
  // The checkpoint's layer, under the identity of the instance that lives.
  Identity identity = *tip_->identity;
  if (identity.layer != next.layer()) identity.uid = NewUid();
  identity.layer = next.layer();
  next.identity = std::make_shared<const Identity>(std::move(identity));
  next.version = previous_version + 1;
  next.parameters_version = next.version;
  next.update_time = absl::Now();
  tip_ = std::make_shared<const InstanceState>(std::move(next));
  Submit({.name = tip_->identity->name, .previous_version = previous_version, .state = tip_},
         {.version = tip_->version, .state = tip_}, std::move(done), /*removal=*/false);
}

void Instance::Remove(const ChangeOptions& options, ChangeDone done) {
  mutex_.Lock();
  absl::Status refused;
  if (removing_ || removed_ || published_ == nullptr) {
    refused = InstanceDeleted();
  } else if (options.expected_version.has_value() && *options.expected_version != tip_->version) {
    refused = VersionMismatch(*options.expected_version, tip_->version);
  } else if (options.request_id.has_value() &&
             requests_.Find(*options.request_id, SteadyNow()).has_value()) {
    refused = OtherMethod();  // a delete would have ended the log
  }
  if (!refused.ok()) {
    mutex_.Unlock();
    return done(refused);
  }
  removing_ = true;
  normd::Change change{.name = tip_->identity->name, .previous_version = tip_->version};
  if (options.request_id.has_value()) {
    change.requests.push_back({.id = *options.request_id,
                               .method = Method::kDelete,
                               .version = tip_->version,
                               .time = SteadyNow()});
  }
  Submit(std::move(change), {.version = tip_->version, .state = tip_}, std::move(done),
         /*removal=*/true);
}

void Instance::Submit(normd::Change change, Changed answer, ChangeDone done, bool removal) {
  if (persister_->acknowledges_at_once()) {
    // Submitted under the lock, so that the persister sees the versions in order.
    absl::Status taken;
    persister_->Submit(std::move(change), [&taken](const absl::Status& status) { taken = status; });
    if (!taken.ok()) {
      TakeBack();
    } else if (removal) {
      removed_ = true;
    } else {
      published_ = answer.state;
    }
    mutex_.Unlock();
    if (!taken.ok()) return done(taken);
    return done(std::move(answer));
  }
  persister_->Submit(std::move(change),
                     [self = shared_from_this(), epoch = epoch_, answer = std::move(answer),
                      done = std::move(done), removal](const absl::Status& status) mutable {
                       self->OnDurable(status, epoch, answer, std::move(done), removal);
                     });
  mutex_.Unlock();
}

void Instance::TakeBack() {
  ++epoch_;
  tip_ = published_;
  removing_ = false;
  requests_.DropAfter(published_ == nullptr ? 0 : published_->version);
}

void Instance::OnDurable(const absl::Status& status, uint64_t epoch, const Changed& answer,
                         ChangeDone done, bool removal) {
  std::vector<Waiter> ready;
  absl::Status failed = status;
  {
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      if (removal) {
        removed_ = true;
      } else {
        published_ = answer.state;
      }
    } else if (epoch == epoch_) {
      TakeBack();
    } else {
      // It built on a change that could not be kept.
      failed = Retryable(absl::StatusCode::kUnavailable,
                         "an earlier change of the instance could not be made durable; retry",
                         absl::Milliseconds(100));
    }
    const uint64_t version = published_ == nullptr ? 0 : published_->version;
    for (auto it = waiters_.begin(); it != waiters_.end();) {
      if (!failed.ok() || removed_ || it->version <= version) {
        ready.push_back(std::move(*it));
        it = waiters_.erase(it);
      } else {
        ++it;
      }
    }
  }
  for (Waiter& waiter : ready) {
    if (failed.ok()) {
      waiter.done(std::move(waiter.answer));
    } else {
      waiter.done(failed);
    }
  }
  if (failed.ok()) {
    done(answer);
  } else {
    done(failed);
  }
}

}  // namespace normd
