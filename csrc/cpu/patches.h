// Patches of pictures as rows and back, element by element or in runs of a patch's width. Included inside a namespace
// without a name.

struct Place {  // a line of patches
  int64_t image, down;
};

inline Place place_of(const Pictures& pictures, int64_t line) {
  const int64_t image = line / pictures.down;
  return {image, line - image * pictures.down};
}

// Read something of every cache line of `bytes`. Where memory is read in its order a processor foresees what comes next; it does
// not foresee the jumps of a patch, each of which would be waited for.
inline void touch(const void* data, int64_t bytes) {
  const auto* first = static_cast<const volatile char*>(data);
  for (int64_t byte = 0; byte < bytes; byte += 64) static_cast<void>(first[byte]);
}

inline void touch(const Pictures& pictures, int64_t size, const Place& place) {  // a line of patches
  const int64_t first = place.image * pictures.image + place.down * pictures.patch * pictures.row;
  for (int64_t channel = 0; channel < pictures.channels; ++channel)
    for (int64_t y = 0; y < pictures.patch; ++y)
      touch(at(static_cast<const void*>(pictures.data), (first + channel * pictures.channel + y * pictures.row) * size),
            ((pictures.across * pictures.patch - 1) * pictures.column + 1) * size);
}

// Between `count` neighbouring patches and their rows, which are `token` elements apart, a line of pixels at a time; P is the
// patch's width where it is known, and runs are then of a known length.
template <class T, int P, bool CUT>
inline void copy_patches(const Pictures& pictures, T* __restrict corner, int64_t count, T* __restrict rows, int64_t token) {
  const int64_t patch = P == 0 ? pictures.patch : P;
  for (int64_t channel = 0; channel < pictures.channels; ++channel)
    for (int64_t y = 0; y < patch; ++y, rows += patch) {
      T* __restrict line = corner + channel * pictures.channel + y * pictures.row;
      T* __restrict row = rows;
      for (int64_t g = 0; g < count; ++g, line += patch * pictures.column, row += token) {
        if (pictures.column != 1) {
          for (int64_t x = 0; x < patch; ++x) CUT ? row[x] = line[x * pictures.column] : line[x * pictures.column] = row[x];
        } else if (P != 0) {
          memcpy(CUT ? row : line, CUT ? line : row, P * sizeof(T));
        } else {
          for (int64_t x = 0; x < patch; ++x) CUT ? row[x] = line[x] : line[x] = row[x];
        }
      }
    }
}

template <class T, bool CUT>
inline void copy_patches(const Pictures& pictures, const Place& place, int64_t across, int64_t count, void* rows, int64_t token) {
  const int64_t y = place.down * pictures.patch, x = across * pictures.patch;
  T* corner = static_cast<T*>(pictures.data) + place.image * pictures.image + y * pictures.row + x * pictures.column;
  switch (pictures.patch) {
    case 8: return copy_patches<T, 8, CUT>(pictures, corner, count, static_cast<T*>(rows), token);
    case 14: return copy_patches<T, 14, CUT>(pictures, corner, count, static_cast<T*>(rows), token);
    case 16: return copy_patches<T, 16, CUT>(pictures, corner, count, static_cast<T*>(rows), token);
    default: return copy_patches<T, 0, CUT>(pictures, corner, count, static_cast<T*>(rows), token);
  }
}

template <bool CUT>
inline void copy_patches(const Pictures& pictures, int64_t size, const Place& place, int64_t across, int64_t count, void* rows,
                         int64_t token) {
  switch (size) {
    case 1: return copy_patches<uint8_t, CUT>(pictures, place, across, count, rows, token);
    case 2: return copy_patches<uint16_t, CUT>(pictures, place, across, count, rows, token);
    case 4: return copy_patches<uint32_t, CUT>(pictures, place, across, count, rows, token);
    default: return copy_patches<uint64_t, CUT>(pictures, place, across, count, rows, token);
  }
}

// The patch `across` of a line into a row of neighbouring elements of `size` bytes.
inline void cut_patch(const Pictures& pictures, int64_t size, const Place& place, int64_t across, void* row) {
  copy_patches<true>(pictures, size, place, across, 1, row, 0);
}

// The other way, for `count` patches from `across` on and rows that are `token` elements apart.
inline void paste_patches(const Pictures& pictures, int64_t size, const Place& place, int64_t across, int64_t count, void* rows,
                          int64_t token) {
  copy_patches<false>(pictures, size, place, across, count, rows, token);
}

// A row whose elements are `stride` apart, of `size` bytes: where it is if that is 1, else in `dense`.
inline void* without_gaps(void* row, int64_t size, int64_t stride, int64_t count, void* dense) {
  if (stride == 1) return row;
  const auto copy = [=](auto* to) {
    const auto* from = static_cast<decltype(to)>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  };
  switch (size) {
    case 1: copy(static_cast<uint8_t*>(dense)); break;
    case 2: copy(static_cast<uint16_t*>(dense)); break;
    case 4: copy(static_cast<uint32_t*>(dense)); break;
    default: copy(static_cast<uint64_t*>(dense));
  }
  return dense;
}
