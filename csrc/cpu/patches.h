// Patches of pictures as rows and back, element by element or in runs of a patch's width. Included inside a namespace
// without a name.

struct Place {  // a line of patches
  int64_t image, down;
};

inline Place place_of(const Pictures& pictures, int64_t line) {
  const int64_t image = line / pictures.down;
  return {image, line - image * pictures.down};
}

// Between a patch and its row; P is the patch's width where it is known, and runs are then of a known length.
template <class T, int P, bool CUT>
inline void copy_patch(const Pictures& pictures, T* __restrict corner, T* __restrict row) {
  const int64_t patch = P == 0 ? pictures.patch : P;
  for (int64_t channel = 0; channel < pictures.channels; ++channel)
    for (int64_t y = 0; y < patch; ++y, row += patch) {
      T* __restrict line = corner + channel * pictures.channel + y * pictures.row;
      if (pictures.column != 1) {
        for (int64_t x = 0; x < patch; ++x) CUT ? row[x] = line[x * pictures.column] : line[x * pictures.column] = row[x];
      } else if (P != 0) {
        memcpy(CUT ? row : line, CUT ? line : row, P * sizeof(T));
      } else {
        for (int64_t x = 0; x < patch; ++x) CUT ? row[x] = line[x] : line[x] = row[x];
      }
    }
}

template <class T, bool CUT>
inline void copy_patch(const Pictures& pictures, const Place& place, int64_t across, void* row) {
  const int64_t y = place.down * pictures.patch, x = across * pictures.patch;
  T* corner = static_cast<T*>(pictures.data) + place.image * pictures.image + y * pictures.row + x * pictures.column;
  switch (pictures.patch) {
    case 8: return copy_patch<T, 8, CUT>(pictures, corner, static_cast<T*>(row));
    case 14: return copy_patch<T, 14, CUT>(pictures, corner, static_cast<T*>(row));
    case 16: return copy_patch<T, 16, CUT>(pictures, corner, static_cast<T*>(row));
    default: return copy_patch<T, 0, CUT>(pictures, corner, static_cast<T*>(row));
  }
}

template <bool CUT>
inline void copy_patch(const Pictures& pictures, int64_t size, const Place& place, int64_t across, void* row) {
  switch (size) {
    case 1: return copy_patch<uint8_t, CUT>(pictures, place, across, row);
    case 2: return copy_patch<uint16_t, CUT>(pictures, place, across, row);
    case 4: return copy_patch<uint32_t, CUT>(pictures, place, across, row);
    default: return copy_patch<uint64_t, CUT>(pictures, place, across, row);
  }
}

// The patch `across` of a line into a row of neighbouring elements of `size` bytes.
inline void cut_patch(const Pictures& pictures, int64_t size, const Place& place, int64_t across, void* row) {
  copy_patch<true>(pictures, size, place, across, row);
}

inline void paste_patch(const Pictures& pictures, int64_t size, const Place& place, int64_t across, void* row) {
  copy_patch<false>(pictures, size, place, across, row);
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
