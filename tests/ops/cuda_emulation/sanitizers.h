// Part of emulation.cpp: the functions that the compiler calls before each access and where behaviour is undefined.

namespace {
[[gnu::noinline]] void undefined_behaviour(const void* data, const char* what, uintptr_t value) {
  struct Location {
    const char* file;
    uint32_t line, column;
  };
  const auto* at = static_cast<const Location*>(data);
  if (!emulation::current) {
    std::fprintf(stderr, "%s:%u: %s %#zx in host code\n", at->file, at->line, what, static_cast<size_t>(value));
    std::abort();
  }
  emulation::fail("%s:%u: %s %#zx", emulation::base(at->file), at->line, what, static_cast<size_t>(value));
}
}  // namespace

#define CHECK(n, write) \
  emulation::access(__builtin_return_address(0), reinterpret_cast<uintptr_t>(p), n, write)
#define ACCESS(n)                                             \
  void __tsan_read##n(void* p) { CHECK(n, false); }           \
  void __tsan_write##n(void* p) { CHECK(n, true); }           \
  void __tsan_volatile_read##n(void* p) { CHECK(n, false); }  \
  void __tsan_volatile_write##n(void* p) { CHECK(n, true); }
#define ATOMIC(bits)                                                                                                  \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) { return *p; }                    \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) { *p = v; }                     \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v, int) {                  \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                   \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t v, int) {                 \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t v, int) {                 \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v,  \
                                                    int, int) {                                                       \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }
#define UNDEFINED(name, what) \
  void __ubsan_handle_##name(void* data, uintptr_t value) { undefined_behaviour(data, what, value); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { CHECK(n, false); }
void __tsan_write_range(void* p, size_t n) { CHECK(n, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
UNDEFINED(type_mismatch_v1, "a misaligned or null address")
UNDEFINED(out_of_bounds, "an index outside its array,")
UNDEFINED(shift_out_of_bounds, "a shift out of bounds of")
UNDEFINED(divrem_overflow, "a division by zero of")
UNDEFINED(add_overflow, "an integer overflow from")
UNDEFINED(sub_overflow, "an integer overflow from")
UNDEFINED(mul_overflow, "an integer overflow from")
UNDEFINED(negate_overflow, "an integer overflow from")
}
