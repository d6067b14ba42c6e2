// draw on the CPU. Laptops and CI run it. It never sorts a row: histograms find where top-k and top-p end.

#include "sampling/draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/numbers.h"
#include "include/dispatch.h"
#include "sampling/greedy.h"

namespace llama_te {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBucketBits = 12;
constexpr int kBuckets = 1 << kBucketBits;

int bucket_of(std::uint32_t key) {
    return static_cast<int>(key >> (32 - kBucketBits));
}

// A token in the order of falling logits, the lowest id first among equal ones.
struct Place {
    std::uint32_t key;
    std::int32_t token;

    bool before(const Place &other) const {
        return key != other.key ? key > other.key : token < other.token;
    }
};

// A row's logits divided by its temperature, and memory for its histograms.
class Row {
   public:
    explicit Row(std::int32_t vocabulary)
        : vocabulary_(vocabulary), logits_(static_cast<std::size_t>(vocabulary)), counts_(kBuckets), shares_(kBuckets) {
    }

    template <typename Element>
    void load(const char *from, float temperature) {
        const Element *const numbers = reinterpret_cast<const Element *>(from);
        const float divisor = temperature > 0 ? temperature : 1.0F;
        greatest_ = -kInfinity;
        bool has_nan = false;
        for (std::int32_t token = 0; token < vocabulary_; ++token) {
            const float logit = static_cast<float>(numbers[token].get()) / divisor;
            logits_[static_cast<std::size_t>(token)] = logit;
            has_nan |= std::isnan(logit);
            greatest_ = logit > greatest_ ? logit : greatest_;
        }
        is_finite_ = !has_nan && std::isfinite(greatest_);
    }

    bool is_finite() const {
        return is_finite_;
    }

    std::int64_t likeliest() const {
        return std::find(logits_.begin(), logits_.end(), greatest_) - logits_.begin();
    }

    // The token with the greatest sum of logit and noise, from those that `keeps` allows.
    template <typename Keeps>
    std::int64_t best(const NoiseKey &key, const Keeps &keeps) const {
        float best = -kInfinity;
        std::int64_t chosen = kNoToken;
        for (std::int32_t token = 0; token < vocabulary_; ++token) {
            const float logit = logits_[static_cast<std::size_t>(token)];
            const std::uint32_t bits = noise_bits(key, token);
            // Few tokens can win, and the others need no logarithm. The bound's own rounding is less than the margin.
            if (logit + gumbel_bound(bits) + 1e-3F < best || !keeps(token, logit)) {
                continue;
            }
            const float sum = logit + gumbel(bits);
            if (sum > best) {
                best = sum;
                chosen = token;
            }
        }
        return std::isfinite(best) ? chosen : kNoToken;
    }

    // The last token that top-k and top-p keep, in the order of `Place`.
    Place last(std::int64_t top_k, float top_p) {
        const std::uint32_t least = top_k < vocabulary_ ? kth(top_k) : 0;  // tokens as likely as the k-th one stay too
        return top_p < 1 ? reaching(least, top_p) : Place{least, vocabulary_};
    }

    float weight(float logit) const {
        return std::exp(logit - greatest_);
    }

   private:
    std::uint32_t key(std::int32_t token) const {
        return ordered(logits_[static_cast<std::size_t>(token)]);
    }

    // The key of the k-th token.
    std::uint32_t kth(std::int64_t k) {
        std::fill(counts_.begin(), counts_.end(), 0);
        for (std::int32_t token = 0; token < vocabulary_; ++token) {
            ++counts_[static_cast<std::size_t>(bucket_of(key(token)))];
        }
        int bucket = kBuckets - 1;
        while (k > counts_[static_cast<std::size_t>(bucket)]) {
            k -= counts_[static_cast<std::size_t>(bucket--)];
        }
        std::vector<Place> &places = gather(bucket, 0);
        const auto at = places.begin() + (k - 1);
        std::nth_element(places.begin(), at, places.end(), [](const Place &a, const Place &b) { return a.before(b); });
        return at->key;
    }

    // The token with which the sum of shares reaches the limit of top-p, among those whose keys are at least `least`.
    Place reaching(std::uint32_t least, float top_p) {
        std::fill(shares_.begin(), shares_.end(), 0);
        std::int64_t total = 0;
        for (std::int32_t token = 0; token < vocabulary_; ++token) {
            const std::uint32_t here = key(token);
            if (here >= least) {
                const std::int64_t share = share_of(weight(logits_[static_cast<std::size_t>(token)]));
                shares_[static_cast<std::size_t>(bucket_of(here))] += share;
                total += share;
            }
        }
        std::int64_t left = std::max<std::int64_t>(1, top_p_limit(total, std::max(0.0F, top_p)));
        int bucket = kBuckets - 1;
        while (bucket > 0 && left > shares_[static_cast<std::size_t>(bucket)]) {
            left -= shares_[static_cast<std::size_t>(bucket--)];
        }
        std::vector<Place> &places = gather(bucket, least);
        std::sort(places.begin(), places.end(), [](const Place &a, const Place &b) { return a.before(b); });
        for (const Place &place : places) {
            left -= share_of(weight(logits_[static_cast<std::size_t>(place.token)]));
            if (left <= 0) {
                return place;
            }
        }
        return {least, vocabulary_};
    }

    std::vector<Place> &gather(int bucket, std::uint32_t least) {
        places_.clear();
        for (std::int32_t token = 0; token < vocabulary_; ++token) {
            const std::uint32_t here = key(token);
            if (bucket_of(here) == bucket && here >= least) {
                places_.push_back({here, token});
            }
        }
        return places_;
    }

    std::int32_t vocabulary_;
    std::vector<float> logits_;
    std::vector<std::int32_t> counts_;
    std::vector<std::int64_t> shares_;
    std::vector<Place> places_;
    float greatest_ = 0;
    bool is_finite_ = false;
};

std::int64_t draw(Row &row, const float *numbers, const std::int64_t *integers, std::int32_t vocabulary) {
    const float temperature = numbers[0];
    const float top_p = numbers[1];
    const float min_p = numbers[2];
    if (!row.is_finite()) {
        return kNoToken;
    }
    if (!(temperature > 0)) {
        return row.likeliest();
    }
    const std::int64_t top_k = std::clamp<std::int64_t>(integers[1], 1, vocabulary);
    const NoiseKey key = noise_key(integers[0], integers[2]);
    const bool is_cut = top_k < vocabulary || top_p < 1;
    if (!is_cut && !(min_p > 0)) {
        return row.best(key, [](std::int32_t, float) { return true; });
    }
    const Place last = is_cut ? row.last(top_k, top_p) : Place{0, vocabulary};
    return row.best(key, [&](std::int32_t token, float logit) {
        return !last.before({ordered(logit), token}) && row.weight(logit) >= min_p;
    });
}

template <typename Element>
void draw_rows(const DrawArguments &a) {
    Row row(a.vocabulary);
    for (std::int32_t index = 0; index < a.rows; ++index) {
        const float *const numbers = a.numbers + 3 * static_cast<std::int64_t>(index);
        const std::int64_t *const integers = a.integers + 3 * static_cast<std::int64_t>(index);
        row.load<Element>(a.logits + index * a.row_bytes, numbers[0]);
        a.tokens[index] = draw(row, numbers, integers, a.vocabulary);
    }
}

}  // namespace

void draw_cpu(const DrawArguments &arguments) {
    dispatch("draw", Elements{}, arguments.element, [&](auto element) {
        draw_rows<typename Number<decltype(element)::value>::Type>(arguments);
    });
}

}  // namespace llama_te
