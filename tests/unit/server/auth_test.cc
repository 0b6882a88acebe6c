#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "normd/v1/norm_service.pb.h"
#include "server/admission/call_gate.h"
#include "server/auth/auth_file.h"
#include "server/auth/authenticator.h"
#include "server/auth/caller.h"
#include "server/auth/permissions.h"
#include "server/state/sha256.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string Line(const std::string& token, const std::string& rest) {
  return absl::StrCat("sha256:", Sha256Hex(token), " ", rest, "\n");
}

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(Permissions, HaveOneRowForEachMethodOfTheService) {
  const auto* service =
      v1::GetServerInfoRequest::descriptor()->file()->FindServiceByName("NormService");
  ASSERT_NE(service, nullptr);
  std::multiset<std::string> methods;
  for (int i = 0; i < service->method_count(); ++i) methods.insert(service->method(i)->name());
  std::multiset<std::string> rows;
  for (const Permission& permission : Permissions()) rows.insert(permission.method);
  EXPECT_EQ(rows, methods);
}

TEST(Permissions, AskForNamesWhereTheRequestHasThem) {
  const auto* service =
      v1::GetServerInfoRequest::descriptor()->file()->FindServiceByName("NormService");
  for (int i = 0; i < service->method_count(); ++i) {
    const auto* method = service->method(i);
    const auto* request = method->input_type();
    if (const auto* header = request->FindFieldByName("header")) request = header->message_type();
    const Permission* permission = FindPermission(method->name());
    ASSERT_NE(permission, nullptr) << method->name();
    EXPECT_EQ(permission->scope == Scope::kName, request->FindFieldByName("name") != nullptr)
        << method->name();
    EXPECT_EQ(permission->scope == Scope::kNames, request->FindFieldByName("names") != nullptr)
        << method->name();
  }
}

TEST(Permissions, RefuseAMethodWithoutARowToEveryone) {
  EXPECT_EQ(FindPermission("Unheard"), nullptr);
  EXPECT_TRUE(absl::IsPermissionDenied(CheckRole(Caller::Everyone("root"), nullptr)));
}

TEST(Caller, MayOnPrefixesWhatTheirRoleMay) {
  const Caller caller("x", {{Role::kUser, "net/"}, {Role::kReader, ""}, {Role::kAdmin, "net/a"}});
  EXPECT_TRUE(caller.May(Role::kReader, "other"));
  EXPECT_FALSE(caller.May(Role::kUser, "other"));
  EXPECT_FALSE(caller.May(Role::kUser, "net"));
  EXPECT_TRUE(caller.May(Role::kUser, "net/b"));
  EXPECT_FALSE(caller.May(Role::kAdmin, "net/b"));
  EXPECT_TRUE(caller.May(Role::kAdmin, "net/ab"));
  EXPECT_TRUE(caller.MayOnAll(Role::kReader));
  EXPECT_FALSE(caller.MayOnAll(Role::kUser));
  EXPECT_TRUE(caller.MaySomewhere(Role::kAdmin));
  EXPECT_FALSE(Caller("nobody", {}).MaySomewhere(Role::kReader));
}

TEST(Caller, SeesEachVisibleNameUnderOnePrefix) {
  const Caller caller(
      "x",
      {{Role::kReader, "b/"}, {Role::kAdmin, "a/x/"}, {Role::kUser, "a/"}, {Role::kUser, "c"}});
  EXPECT_THAT(caller.Visible(Role::kReader, ""), ElementsAre("a/", "b/", "c"));
  EXPECT_THAT(caller.Visible(Role::kUser, ""), ElementsAre("a/", "c"));
  EXPECT_THAT(caller.Visible(Role::kReader, "a/x/y"), ElementsAre("a/x/y"));
  EXPECT_THAT(caller.Visible(Role::kReader, "b"), ElementsAre("b/"));
  EXPECT_THAT(caller.Visible(Role::kReader, "d"), IsEmpty());
}

TEST(AuthFile, AddsUpTheLinesOfACredential) {
  const auto file =
      AuthFile::Parse(absl::StrCat("# who may do what\n\n", Line("one", "a user net/,b # both"),
                                   Line("one", "a\tadmin *"), "cn:ops ops reader *\r\n"),
                      "auth");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->size(), 2u);
  ASSERT_NE(file->FindToken("one"), nullptr);
  EXPECT_EQ(file->FindToken("one")->name(), "a");
  EXPECT_TRUE(file->FindToken("one")->MayOnAll(Role::kAdmin));
  for (const char* wrong : {"", "on", "onee", "ONE", "cn:ops"}) {
    EXPECT_EQ(file->FindToken(wrong), nullptr) << wrong;
  }
  EXPECT_EQ(file->FindToken(Sha256Hex("one")), nullptr);
}

TEST(AuthFile, TellsCommonFromAlternativeNames) {
  const auto file = AuthFile::Parse("cn:a one reader *\nsan:b two admin net/\n", "auth");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->FindCertificate({"b"}, {"a"}), nullptr);
  EXPECT_EQ(file->FindCertificate({}, {}), nullptr);
  const auto both = file->FindCertificate({"a"}, {"x", "b"});
  ASSERT_NE(both, nullptr);
  EXPECT_TRUE(both->May(Role::kReader, "x"));
  EXPECT_TRUE(both->May(Role::kAdmin, "net/x"));
  EXPECT_FALSE(both->May(Role::kUser, "x"));
}

TEST(AuthFile, NamesTheLineAndTheColumnAtFault) {
  for (const auto& [text, saying] : std::vector<std::pair<std::string, std::string>>{
           {"sha256:12 a user *", "CREDENTIAL"},
           {"md5:12 a user *", "CREDENTIAL"},
           {"cn: a user *", "CREDENTIAL"},
           {Line("t", "a boss *"), "ROLE"},
           {Line("t", "a User *"), "ROLE"},
           {Line("t", "a user"), "words"},
           {Line("t", "a user * *"), "words"},
           {Line("t", "a user net/,,b"), "NAMES"},
           {Line("t", "a user n*t"), "NAMES"},
           {Line("t", std::string(65, 'a') + " user *"), "NAME"},
           {Line("t", "\"a\" user *"), "NAME"}}) {
    const auto file = AuthFile::Parse(absl::StrCat("#\n", text), "auth");
    ASSERT_TRUE(absl::IsInvalidArgument(file.status())) << text;
    EXPECT_THAT(Message(file.status()), HasSubstr("auth:2")) << text;
    EXPECT_THAT(Message(file.status()), HasSubstr(saying)) << text;
  }
  const auto renamed =
      AuthFile::Parse(absl::StrCat(Line("t", "a user *"), Line("t", "b user *")), "auth");
  EXPECT_THAT(Message(renamed.status()), HasSubstr("auth:2"));
}

TEST(Authenticator, TakesOneBearerTokenThatTheFileKnows) {
  const TemporaryDirectory directory;
  WriteFile(directory.File("auth"), Line("secret", "a user *") + "cn:ops ops admin *\n");
  const auto authenticator = Authenticator::Open(directory.File("auth"));
  ASSERT_TRUE(authenticator.ok()) << authenticator.status();
  const auto name = [&](const Presented& presented) -> std::string {
    const auto caller = (*authenticator)->Authenticate(presented);
    if (caller.ok()) return (*caller)->name();
    EXPECT_TRUE(absl::IsUnauthenticated(caller.status())) << caller.status();
    return "";
  };
  EXPECT_EQ(name({.authorization = {"Bearer secret"}}), "a");
  EXPECT_EQ(name({.authorization = {"bearer secret"}}), "a");
  EXPECT_EQ(name({.common_names = {"ops"}}), "ops");
  EXPECT_EQ(name({.authorization = {"Bearer secret"}, .common_names = {"ops"}}), "a");
  EXPECT_EQ(name({.authorization = {"Bearer wrong"}, .common_names = {"ops"}}), "");
  EXPECT_EQ(name({.authorization = {"Bearer secret", "Bearer secret"}}), "");
  EXPECT_EQ(name({.authorization = {"Bearer "}}), "");
  EXPECT_EQ(name({.authorization = {"secret"}}), "");
  EXPECT_EQ(name({.common_names = {"other"}}), "");
  EXPECT_EQ(name({}), "");
}

TEST(CallGate, RefusesOnceClosedAndWaitsForThoseInside) {
  CallGate gate;
  ASSERT_TRUE(gate.Enter().ok());
  EXPECT_FALSE(gate.Close(absl::InfinitePast()));
  EXPECT_TRUE(absl::IsUnavailable(gate.Enter()));
  gate.Leave();
  EXPECT_TRUE(gate.Close(absl::InfinitePast()));
}

}  // namespace
}  // namespace normd
