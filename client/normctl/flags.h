// Flags that several commands share, and values as people write them.
#ifndef NORMD_CLIENT_NORMCTL_FLAGS_H_
#define NORMD_CLIENT_NORMCTL_FLAGS_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "client/normd_client.h"

namespace normd::normctl {

// A value that the parser fills and the action reads.
template <class T>
std::shared_ptr<T> Shared(T value = {}) {
  return std::make_shared<T>(std::move(value));
}

// A flag or argument whose text is one of a few words, each with its value, in the
// order in which the help shows them; another word is refused with all of them.
template <class T>
CLI::Option* AddChoice(CLI::App& app, const std::string& flag,
                       std::vector<std::pair<std::string, T>> choices, const std::string& help,
                       std::function<void(const T&)> store) {
  std::string words;
  for (const auto& [word, value] : choices) words += (words.empty() ? "" : "|") + word;
  return app
      .add_option_function<std::string>(
          flag,
          [=](const std::string& text) {
            for (const auto& [word, value] : choices) {
              if (word == text) return store(value);
            }
            throw CLI::ValidationError(flag, "'" + text + "' is none of " + words);
          },
          help)
      ->type_name(words);
}

// The NAME of an instance.
std::shared_ptr<std::string> AddName(CLI::App& app);

// --expected_version and --request_id, of every change.
std::shared_ptr<CallOptions> AddChangeFlags(CLI::App& app);

// --mode=train|eval.
std::shared_ptr<std::optional<Mode>> AddMode(CLI::App& app, const std::string& help);

// A flag whose values are these dtypes.
std::shared_ptr<std::optional<DataType>> AddDataType(CLI::App& app, const std::string& flag,
                                                     std::vector<DataType> allowed,
                                                     const std::string& help);

// The dtypes that inputs may have.
std::vector<DataType> InputTypes();

// --memory_format=contiguous|channels_last.
std::shared_ptr<MemoryFormat> AddMemoryFormat(CLI::App& app);

// A duration as Abseil writes it: 500ms, 1m30s.
CLI::Option* AddDuration(CLI::App& app, const std::string& flag, absl::Duration* value,
                         const std::string& help);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_FLAGS_H_
