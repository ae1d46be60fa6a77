// Part of emulation.cpp: the check of each access that a thread makes.

// "file.cu:12: " for an address in this library, as far as addr2line is there to tell.
std::string place(void* address) {
  Dl_info info;
  if (!dladdr(address, &info)) return "";
  char command[600], line[400] = "";
  std::snprintf(command, sizeof(command), "addr2line -e '%s' %#zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(static_cast<char*>(address) - static_cast<char*>(info.dli_fbase)) - 1);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof(line), pipe)) line[0] = 0;
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = 0;
  return line[0] && line[0] != '?' ? std::string(base(line)) + ": " : "";
}

// Whether something orders an access before the one that the current thread makes.
bool ordered(const Access& before, bool shared) {
  if (before.launch != launches) return true;
  if (before.block != block_number) return shared || block_is_atomic;
  if (before.barriers != barriers) return true;
  if (before.thread == current->id) return true;
  return before.warp == current->warp && before.warp_syncs < current->warp_syncs;
}

[[gnu::noinline]] void report_race(void* from, const Region& region, uintptr_t a, const Access& other, bool write,
                                   bool other_writes) {
  char who[80];
  if (other.block != block_number) {
    std::snprintf(who, sizeof(who), "block %lld", static_cast<long long>(other.block));
  } else if (other.thread == kMany) {
    std::snprintf(who, sizeof(who), "other threads");
  } else {
    std::snprintf(who, sizeof(who), "thread %d", other.thread);
  }
  fail("%srace: %s byte %zu of %s that %s %s with no barrier between", place(from).c_str(), write ? "writes" : "reads",
       static_cast<size_t>(a - region.begin), region.shared ? "shared memory" : "a tensor", who,
       other_writes ? "wrote" : "read");
}

[[gnu::noinline]] void check_outside(void* from, uintptr_t a, size_t n, bool write) {
  const auto within = [&](const void* begin, const void* end) {
    return a >= reinterpret_cast<uintptr_t>(begin) && a + n <= reinterpret_cast<uintptr_t>(end);
  };
  if (!write && within(&__ehdr_start, &_end) && !within(static_bytes, std::end(static_bytes))) return;  // constants
  if (!write && within(host_stack_low, host_stack_high)) return;  // the kernel's parameters
  const Region* near = nullptr;
  for (const auto& r : regions) {
    if (r->begin <= a && (!near || r->begin > near->begin)) near = r.get();
  }
  if (dynamic_region.begin <= a && a < dynamic_region.end + 4096 && (!near || near->begin < dynamic_region.begin)) {
    near = &dynamic_region;  // where no tensor lies between
  }
  for (const auto& v : statics) {
    if (v->region.begin <= a && a < v->region.end + kGap) near = &v->region;
  }
  char relative[120] = "memory that is no tensor's";
  if (near && a < near->end + (1 << 20)) {
    std::snprintf(relative, sizeof(relative), "at byte %zu of %zu of %s", static_cast<size_t>(a - near->begin),
                  static_cast<size_t>(near->end - near->begin), near->shared ? "shared memory" : "a tensor");
  }
  fail("%soutside: %s %zu bytes, %s", place(from).c_str(), write ? "writes" : "reads", n, relative);
}

Region* find(uintptr_t a) {
  if (last_region && a >= last_region->begin && a < last_region->end) return last_region;
  if (a >= dynamic_region.begin && a < dynamic_region.end) return last_region = &dynamic_region;
  for (const auto& v : statics) {
    if (a >= v->region.begin && a < v->region.end) return last_region = &v->region;
  }
  const auto before = [](uintptr_t v, const auto& r) { return v < r->begin; };
  const auto after = std::upper_bound(regions.begin(), regions.end(), a, before);
  if (after == regions.begin()) return nullptr;
  Region* r = std::prev(after)->get();
  return a < r->end ? last_region = r : nullptr;
}

void access(void* from, uintptr_t a, size_t n, bool write) {
  if (!current || n == 0) return;  // the host's own accesses are its own business
  const uintptr_t stack = reinterpret_cast<uintptr_t>(stacks) + static_cast<size_t>(current->id) * kStack;
  if (a >= stack && a < stack + kStack) return;
  Region* r = find(a);
  if (!r) return check_outside(from, a, n, write);
  if (a + n > r->end) return check_outside(from, a, n, write);
  if (write && !r->writable) {
    return fail("%swrites byte %zu of a tensor whose pointer is const", place(from).c_str(),
                static_cast<size_t>(a - r->begin));
  }
  const size_t first = (a - r->begin) / r->granule, last = (a + n - 1 - r->begin) / r->granule;
  const Access now{launches, block_number, current->id, current->warp, barriers, current->warp_syncs};
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = r->cells[i];
    if (!ordered(cell.write, r->shared)) return report_race(from, *r, a, cell.write, write, true);
    const bool after_reads = ordered(cell.read, r->shared);
    if (write) {
      if (!after_reads) return report_race(from, *r, a, cell.read, write, false);
      cell.write = now;
    } else if (after_reads) {
      cell.read = now;
    } else if (cell.read.block != block_number) {
      cell.read.block = kMany;
    } else {
      cell.read.thread = kMany;
      if (cell.read.warp != current->warp) cell.read.warp = kMany;
      cell.read.warp_syncs = std::max(cell.read.warp_syncs, current->warp_syncs);
    }
  }
}
