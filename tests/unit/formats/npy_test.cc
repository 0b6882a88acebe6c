#include "formats/npy.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace normd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A file with the dictionary and data as given, whatever they say.
std::string File(const std::string& dictionary, const std::string& data, int version = 1) {
  std::string file = "\x93NUMPY";
  file += static_cast<char>(version);
  file += '\0';
  const size_t length = dictionary.size();
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) {
    file += static_cast<char>(length >> (8 * i) & 0xff);
  }
  return file + dictionary + data;
}

std::string Problem(const std::string& file) {
  const auto parsed = ParseNpy(file);
  if (parsed.ok()) return "it was taken";
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(parsed.status().message());
}

TEST(NpyHeader, IsWhatNumpyWrites) {
  // np.save of np.zeros((2, 3), '<f4'), less its data.
  EXPECT_EQ(NpyHeader({.descr = "<f4", .shape = {2, 3}}),
            absl::StrCat(absl::string_view("\x93NUMPY\x01\0v\0", 10),
                         "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
                         std::string(58, ' '), "\n"));
}

TEST(NpyHeader, AlignsTheDataWhateverTheShape) {
  std::vector<int64_t> shape;
  for (int i = 0; i < 40; ++i) {
    EXPECT_EQ(NpyHeader({.descr = "<f8", .shape = shape}).size() % 64, 0u) << i;
    shape.push_back(i * 7 + 1);
  }
}

TEST(NpyHeader, TakesTheLongerVersionWhereTheHeaderNeedsIt) {
  const std::vector<int64_t> shape(30000, 1);
  const std::string file = NpyHeader({.descr = "<f4", .shape = shape}) + std::string(4, 'x');
  EXPECT_EQ(file[6], 2);
  const auto parsed = ParseNpy(file);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->shape, shape);
}

TEST(Npy, ReadsWhatItWrote) {
  const std::vector<std::vector<int64_t>> shapes = {{}, {0}, {3}, {2, 3}, {2, 0, 4}, {1, 2, 3, 4}};
  for (const auto& shape : shapes) {
    for (const bool fortran_order : {false, true}) {
      size_t count = 1;
      for (const int64_t size : shape) count *= static_cast<size_t>(size);
      const std::string data(count * 2, 'd');
      const std::string file =
          NpyHeader({.descr = "<f2", .shape = shape, .fortran_order = fortran_order}) + data;
      const auto parsed = ParseNpy(file);  // lends from the file
      ASSERT_TRUE(parsed.ok()) << parsed.status();
      EXPECT_EQ(parsed->descr, "<f2");
      EXPECT_EQ(parsed->shape, shape);
      EXPECT_EQ(parsed->fortran_order, fortran_order);
      EXPECT_EQ(parsed->data, data);
    }
  }
}

TEST(Npy, ReadsVersions2And3) {
  for (const int version : {2, 3}) {
    const std::string file =
        File("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", "abcd", version);
    const auto parsed = ParseNpy(file);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_THAT(parsed->shape, ElementsAre(1));
    EXPECT_EQ(parsed->data, "abcd");
  }
}

TEST(Npy, ReadsHeadersThatOtherWritersMake) {
  for (const char* dictionary : {
           "{\"shape\": (1, 2), \"fortran_order\": False, \"descr\": \"<f4\"}",
           "{'descr':'<f4','fortran_order':False,'shape':(1,2)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1L, 2L), }\n",
           " { 'descr' : '<f4' , 'fortran_order' : False , 'shape' : ( 1 , 2 , ) , }  \n",
       }) {
    const auto parsed = ParseNpy(File(dictionary, "12345678"));
    ASSERT_TRUE(parsed.ok()) << dictionary << ": " << parsed.status();
    EXPECT_THAT(parsed->shape, ElementsAre(1, 2));
  }
}

TEST(Npy, ReadsAScalar) {
  const auto parsed =
      ParseNpy(File("{'descr': '<i8', 'fortran_order': False, 'shape': ()}", std::string(8, '\0')));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->shape, IsEmpty());
}

TEST(Npy, TakesOneByteTypesWithoutByteOrder) {
  EXPECT_TRUE(ParseNpy(File("{'descr': '|u1', 'fortran_order': False, 'shape': (2,)}", "ab")).ok());
  EXPECT_THAT(Problem(File("{'descr': '|f4', 'fortran_order': False, 'shape': (1,)}", "abcd")),
              HasSubstr("no known byte order"));
}

TEST(NpyFront, IsEnoughToKnowTheFile) {
  const std::string file = NpyHeader({.descr = "<f4", .shape = {2, 3}}) + std::string(24, 'd');
  for (const size_t read : {file.size(), file.size() - 1, file.size() - 24}) {
    const auto front = ParseNpyFront(std::string_view(file).substr(0, read), file.size());
    ASSERT_TRUE(front.ok()) << front.status();
    EXPECT_THAT(front->array.shape, ElementsAre(2, 3));
    EXPECT_EQ(front->data_offset, file.size() - 24);
  }
  EXPECT_FALSE(ParseNpyFront(file, file.size() + 1).ok());
  EXPECT_FALSE(ParseNpyFront(std::string_view(file).substr(0, 20), file.size()).ok());
}

TEST(Npy, RefusesEveryCutOfASoundFile) {
  const std::string file = NpyHeader({.descr = "<f4", .shape = {2, 3}}) + std::string(24, 'd');
  ASSERT_TRUE(ParseNpy(file).ok());
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_FALSE(ParseNpy(std::string_view(file).substr(0, size)).ok()) << size;
  }
  EXPECT_THAT(Problem(file + "x"), HasSubstr("takes 24 bytes of data, and it has 25"));
}

TEST(Npy, SurvivesEveryFlippedByteOfTheHeader) {
  const std::string file = NpyHeader({.descr = "<f4", .shape = {2, 3}}) + std::string(24, 'd');
  for (size_t i = 0; i < file.size() - 24; ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = file;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      const auto parsed = ParseNpy(damaged);
      if (parsed.ok()) {
        EXPECT_EQ(parsed->data.size(), 24u);
      }
    }
  }
}

TEST(Npy, SaysWhatIsWrong) {
  const struct {
    const char* dictionary;
    const char* problem;
  } cases[] = {
      {"", "not a dictionary"},
      {"[]", "not a dictionary"},
      {"{", "malformed key"},
      {"{}", "lacks 'descr'"},
      {"{'descr': '<f4'}", "lacks 'fortran_order'"},
      {"{'descr': '<f4', 'fortran_order': True}", "lacks 'shape'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)", "does not end"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x", "goes on"},
      {"{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}", "'fortran_order'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (1)}", "'shape'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': 1}", "'shape'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (1, x)}", "'shape'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,)}", "'shape'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}", "'shape'"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "negative size, -1"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", "unknown key 'x'"},
      {"{'descr': '<f4', 'descr': '<f4', 'shape': (1,)}", "'descr' twice"},
      {"{'descr': '<f4\", 'fortran_order': False, 'shape': (1,)}", "does not end"},
      {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", "unsupported 'descr'"},
      {"{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}", "big-endian"},
      {"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "not one of a number"},
      {"{'descr': '|O8', 'fortran_order': False, 'shape': (1,)}", "not one of a number"},
      {"{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", "not one of a number"},
      {"{'descr': '<f0', 'fortran_order': False, 'shape': (1,)}", "not one of a number"},
      {"{'descr': '<f99', 'fortran_order': False, 'shape': (1,)}", "not one of a number"},
      {"{'descr': '<f4x', 'fortran_order': False, 'shape': (1,)}", "not one of a number"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}", "overflows"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4294967296, 4294967296)}",
       "overflows"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", "takes 8 bytes"},
  };
  for (const auto& c : cases) {
    EXPECT_THAT(Problem(File(c.dictionary, "abcd")), HasSubstr(c.problem)) << c.dictionary;
  }
}

TEST(Npy, RefusesOtherFilesAndVersions) {
  EXPECT_THAT(Problem("PK\x03\x04 an .npz file"), HasSubstr("does not begin"));
  EXPECT_THAT(Problem(File("{}", "", 4)), HasSubstr("version is 4.0"));
  std::string minor = File("{}", "");
  minor[7] = 9;
  EXPECT_THAT(Problem(minor), HasSubstr("version is 1.9"));
  EXPECT_THAT(Problem(std::string("\x93NUMPY\x02\0\xff\xff\xff\xff", 12)),
              HasSubstr("claims 4294967295 bytes"));
}

}  // namespace
}  // namespace normd
