// completion, version.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"

namespace normd::normctl {
namespace {

// A command as completion sees it: "" is normctl itself, " state get" a command.
struct Node {
  std::string path;
  struct Word {
    std::string text;  // "create", "--input="
    std::string help;  // its first line
  };
  std::vector<Word> commands;
  std::vector<Word> flags;
};

void Walk(const CLI::App& app, const std::string& path, std::vector<Node>* nodes) {
  Node node = {.path = path, .commands = {}, .flags = {}};
  for (const CLI::App* command : app.get_subcommands({})) {
    node.commands.push_back({command->get_name(), command->get_description()});
  }
  for (const CLI::Option* option : app.get_options()) {
    // normctl's own --help stands for all.
    if (option == app.get_help_ptr() && app.get_parent() != nullptr) continue;
    for (const std::string& name : option->get_lnames()) {
      const bool takes_value = option->get_expected_max() > 0;
      node.flags.push_back(
          {absl::StrCat("--", name, takes_value ? "=" : ""), option->get_description()});
    }
  }
  nodes->push_back(std::move(node));
  for (const CLI::App* command : app.get_subcommands({})) {
    Walk(*command, absl::StrCat(path, " ", command->get_name()), nodes);
  }
}

std::string Joined(const std::vector<Node::Word>& words) {
  return absl::StrJoin(words, " ",
                       [](std::string* out, const Node::Word& word) { out->append(word.text); });
}

// A `case` of shell that sets the words which may follow each path.
std::string ShellCases(const std::vector<Node>& nodes) {
  std::string cases;
  for (const Node& node : nodes) {
    std::string words = Joined(node.commands);
    if (!words.empty()) words += ' ';
    words += Joined(node.flags);
    // Flags of normctl itself may follow any command.
    if (!node.path.empty()) absl::StrAppend(&words, " ", Joined(nodes.front().flags));
    absl::StrAppend(&cases, "    '", node.path, "') words='", words, "' ;;\n");
  }
  return cases;
}

// The alternatives of all paths, to follow the words typed so far.
std::string Paths(const std::vector<Node>& nodes) {
  std::vector<std::string> paths;
  for (const Node& node : nodes) {
    if (!node.path.empty()) paths.push_back(absl::StrCat("'", node.path, "'"));
  }
  return absl::StrJoin(paths, "|");
}

std::string Bash(const std::vector<Node>& nodes) {
  return absl::StrReplaceAll(R"(# bash completion of normctl:  source <(normctl completion bash)
_normctl() {
  local cur=${COMP_WORDS[COMP_CWORD]} path='' words='' word
  if [[ $cur == = || ${COMP_WORDS[COMP_CWORD-1]} == = ]]; then
    [[ $cur == = ]] && cur=''
    COMPREPLY=($(compgen -f -- "$cur"))
    return
  fi
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$path $word" in @PATHS@) path+=" $word" ;; esac
  done
  case "$path" in
@CASES@  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _normctl normctl
)",
                             {{"@PATHS@", Paths(nodes)}, {"@CASES@", ShellCases(nodes)}});
}

std::string Zsh(const std::vector<Node>& nodes) {
  return absl::StrReplaceAll(
      R"(#compdef normctl
# zsh completion of normctl:  source <(normctl completion zsh)
_normctl() {
  local path_='' words_='' word_
  for word_ in "${(@)words[2,CURRENT-1]}"; do
    case "$path_ $word_" in @PATHS@) path_+=" $word_" ;; esac
  done
  case "$path_" in
@CASES@  esac
  local -a plain valued
  for word_ in ${=words_}; do
    if [[ $word_ == *= ]]; then valued+=($word_); else plain+=($word_); fi
  done
  if compset -P '--*='; then _files; return; fi
  compadd -- $plain
  compadd -S '' -- $valued
}
compdef _normctl normctl
)",
      {{"@PATHS@", Paths(nodes)},
       {"@CASES@", absl::StrReplaceAll(ShellCases(nodes), {{" words='", " words_='"}})}});
}

std::string Quoted(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"'", "\\'"}}), "'");
}

std::string Fish(const std::vector<Node>& nodes) {
  std::string script =
      "# fish completion of normctl:  normctl completion fish | source\n"
      "complete -c normctl -e\n";
  for (const Node& node : nodes) {
    // When to offer this node's words: its own words are there, and no word of a
    // command below it.
    std::string when = "true";
    if (!node.path.empty()) {
      when =
          absl::StrReplaceAll(node.path, {{" ", "; and __fish_seen_subcommand_from "}}).substr(6);
    }
    std::string inside;
    if (!node.commands.empty()) {
      inside = absl::StrCat("; and not __fish_seen_subcommand_from ", Joined(node.commands));
    }
    for (const Node::Word& word : node.commands) {
      absl::StrAppend(&script, "complete -c normctl -f -n ", Quoted(absl::StrCat(when, inside)),
                      " -a ", word.text, " -d ", Quoted(word.help), "\n");
    }
    for (const Node::Word& word : node.flags) {
      std::string name = word.text.substr(2);
      const bool takes_value = name.back() == '=';
      if (takes_value) name.pop_back();
      absl::StrAppend(&script, "complete -c normctl -n ", Quoted(when), " -l ", name,
                      takes_value ? " -r" : "", " -d ", Quoted(word.help), "\n");
    }
  }
  return script;
}

using Script = std::string (*)(const std::vector<Node>&);

Action Completion(CLI::App& app) {
  auto script_for = Shared<Script>(nullptr);
  AddChoice<Script>(app, "shell", {{"bash", Bash}, {"zsh", Zsh}, {"fish", Fish}},
                    "Whose script to print",
                    [script_for](const Script& value) { *script_for = value; })
      ->required();
  return [=](Session& session) -> absl::StatusOr<Report> {
    std::vector<Node> nodes;
    Walk(session.root, "", &nodes);
    const std::string script = (*script_for)(nodes);
    return Report{.json = {{"script", script}}, .text = script};
  };
}

Action Version(CLI::App&) {
  return [](Session&) -> absl::StatusOr<Report> {
    return Report{.json = {{"version", NORMD_VERSION}},
                  .text = absl::StrCat("normctl ", NORMD_VERSION, "\n")};
  };
}

constexpr Command kCommands[] = {
    {"completion", "Print a shell's completion script", "completion bash", Completion},
    {"version", "Print normctl's version; the server's is in info", "version", Version},
};

}  // namespace

absl::Span<const Command> ShellCommands() { return kCommands; }

}  // namespace normd::normctl
