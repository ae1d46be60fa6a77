// Part of emulation.cpp: which memory there is.

void* static_shared(const void* key, size_t size, size_t align) {
  Static* found = nullptr;
  for (const auto& v : statics) {
    if (v->key == key) found = v.get();
  }
  if (!found) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(static_bytes);
    const uintptr_t start = statics.empty() ? first : statics.back()->region.end + kGap;
    const uintptr_t begin = (start + align - 1) / align * align;
    if (begin + size > first + sizeof(static_bytes)) fail("more __shared__ variables than a GPU has");
    Region region{begin, begin + size, 1, true, true, std::vector<Cell>(size)};
    statics.push_back(std::make_unique<Static>(Static{key, -1, std::move(region)}));
    found = statics.back().get();
  }
  void* p = reinterpret_cast<void*>(found->region.begin);
  if (found->block != block_number) std::memset(p, 0xff, size);
  found->block = block_number;
  return p;
}

void memory(const void* p, size_t size, bool writable, size_t granule) {
  if (size == 0) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + size;
  const std::lock_guard lock(running);
  for (auto& r : regions) {
    if (r->begin == begin && r->end == end && r->granule <= granule) {
      r->writable |= writable;
      return;
    }
  }
  for (size_t i = regions.size(); i-- > 0;) {  // two views of one storage are one region
    Region& r = *regions[i];
    if (r.end <= begin || end <= r.begin) continue;
    begin = std::min(begin, r.begin);
    end = std::max(end, r.end);
    granule = std::min(granule, r.granule);
    writable |= r.writable;
    regions.erase(regions.begin() + static_cast<long>(i));
  }
  auto made = std::make_unique<Region>(Region{begin, end, granule, writable, false, {}});
  made->cells.resize((end - begin + granule - 1) / granule);
  regions.insert(std::upper_bound(regions.begin(), regions.end(), begin,
                                  [](uintptr_t v, const auto& r) { return v < r->begin; }),
                 std::move(made));
  last_region = nullptr;
}

void tensor(AtenTensorHandle t, const void* p, bool writable) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(t, &dim);
  aoti_torch_get_sizes(t, &sizes);
  aoti_torch_get_strides(t, &strides);
  aoti_torch_get_dtype(t, &dtype);
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  const size_t element = aoti_torch_dtype_element_size(dtype);
  memory(p, static_cast<size_t>(last + 1) * element, writable, element);
}

void copied(const void* device, size_t size, bool written) {
  const std::lock_guard lock(running);
  const uintptr_t a = reinterpret_cast<uintptr_t>(device);
  for (const auto& r : regions) {
    if (a >= r->begin && a + size <= r->end && (r->writable || !written)) return;
  }
  throw std::runtime_error("cudaMemcpyAsync or cudaMemsetAsync outside a tensor");
}
