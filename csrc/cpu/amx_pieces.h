// float32 on bfloat16 tiles: values as sums of bfloat16 pieces, and products of such sums.
//
// A float32 value is the sum of three bfloat16 values: its first 8 bits, rounded, then those of
// what that leaves, and the rest. A product of two values x and w is then a sum of products of
// pieces, which the tiles add up in float32. x0 w0, x0 w1, x1 w0, x0 w2, x1 w1 and x2 w0 are
// computed; what is left out is below 2^-24 of the product, a rounding of float32. A value that is
// stored in fewer bits has fewer pieces: with bfloat16 there are 3 products instead of 6, with
// float16 5.
//
// Tiles take pieces, products and sums below 2^-126 for 0, so a term is right to 2^-24 of itself or
// to a few times 2^-126. Values that are infinite, no numbers or at least 2^128 - 2^119 make their
// sums NaN.
//
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/amx_pack.h"

namespace cptool::cpu {
namespace {

constexpr int kFloat32Pieces = 3;

// Into how many bfloat16 values a value of type T is split without loss.
template <class T>
constexpr int kPiecesOf = kFloat32Pieces;
template <>
constexpr int kPiecesOf<BFloat16> = 1;
template <>
constexpr int kPiecesOf<Float16> = 2;  // 11 bits

// Rounds two vectors to bfloat16, to nearest or towards 0, lane i of both to pair i, and takes what
// was rounded for the vectors. So values i and i + 16 of 32 are multiplied as a pair, on both
// sides.
template <bool kNearest>
inline __m512i take_piece(Vector (&values)[2]) {
  __m512i bits[2];
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m512i whole = _mm512_castps_si512(values[v]);
    bits[v] = kNearest ? _mm512_add_epi32(whole, _mm512_set1_epi32(0x8000)) : whole;
    bits[v] = _mm512_and_si512(bits[v], _mm512_set1_epi32(-0x10000));
    values[v] = _mm512_sub_ps(values[v], _mm512_castsi512_ps(bits[v]));
  }
  return pair_up(bits[0], bits[1]);
}

// Splits 32 values; put(piece, number) takes each piece. The last is what remains, which has no
// more bits than a piece or is not a number, as it is.
template <int kPieces, bool kNearest = true, class Put>
inline void split(Vector (&values)[2], const Put& put) {
  if constexpr (kPieces > 1) put(take_piece<kNearest>(values), 0);
  if constexpr (kPieces > 2) put(take_piece<kNearest>(values), 1);
  put(take_piece<false>(values), kPieces - 1);
}

// Loads two tiles: those of piece `piece` of one side of a product, [pieces][2].
template <int kFirst>
inline void load_pair(const char* tiles, int piece) {
  load_tile<kFirst>(tiles + 2 * piece * kTileBytes);
  load_tile<kFirst + 1>(tiles + (2 * piece + 1) * kTileBytes);
}

// Adds four products to tiles 0 to 3, [2 of tiles 4 and 5][2 of tiles 6 and 7].
inline void multiply_pairs() {
  multiply_tiles<0, 4, 6>();
  multiply_tiles<1, 4, 7>();
  multiply_tiles<2, 5, 6>();
  multiply_tiles<3, 5, 7>();
}

// How many products of pieces make a product with three pieces on the other side.
template <int kPieces>
constexpr int kProducts = kPieces == 1   ? 3
                          : kPieces == 2 ? 5
                                         : 6;

// Adds product number `number` of pieces of a and b, which has three, to tiles 0 to 3, the smallest
// products first. Each tile stays for the next product where that takes it too.
template <int kPieces>
inline void multiply_pieces(const char* a, const char* b, int number) {
  switch (number) {
    case 0:
      load_pair<6>(b, 2);
      load_pair<4>(a, 0);
      break;
    case 1:
      load_pair<6>(b, 1);
      break;
    case 2:
      if constexpr (kPieces == 1) {
        load_pair<6>(b, 0);
      } else {
        load_pair<4>(a, 1);
      }
      break;
    case 3:
      load_pair<6>(b, 0);
      break;
    case 4:
      load_pair<4>(a, kPieces == 2 ? 0 : 2);
      break;
    default:
      load_pair<4>(a, 0);
  }
  multiply_pairs();
}

}  // namespace
}  // namespace cptool::cpu
